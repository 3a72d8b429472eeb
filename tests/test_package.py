"""The package as its users meet it: what it needs, what it imports, what its commands and its README say."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distributions as distributions_installed
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# A module imports only from those to its left (nbs/00_config ... nbs/21_readout, then the command line).
ORDER = """config files scenes data shards machine patches masking vit mae masker curriculum teacher
           losses world estimators objectives trainer evaluate health figures pipeline cost runs difficulty
           doctor bakeoff readout __main__""".split()
MODULES = [path for path in sorted((ROOT / "clmae").glob("*.py")) if path.stem not in {"__init__", "_modidx"}]


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def required(key: str) -> dict[str, Requirement]:
    found = [Requirement(text) for text in settings()[key].split()]
    return {canonicalize_name(each.name): each for each in found}


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def imported(source: str, top_level_only: bool) -> set[str]:
    """Dotted names that `source` imports, everywhere or only where importing it runs them."""
    tree = ast.parse(source)
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(["clmae"] * node.level + [node.module] * bool(node.module))
            names |= {f"clmae.{alias.name}" for alias in node.names} if module == "clmae" else {module}
    return names


def distributions(names: set[str]) -> set[str]:
    """The third-party distributions that provide these modules."""
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"clmae"}
    table = packages_distributions()
    return {canonicalize_name(table[top][0]) for top in tops}


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **kwargs)


# ---- what it needs


@pytest.mark.parametrize(
    "key", ["requirements", "stream_requirements", "repro_requirements", "dev_requirements"]
)
def test_every_requirement_is_locked_at_a_version_it_allows(key):
    pins = locked()
    for name, requirement in required(key).items():
        assert name in pins, f"{name} ({key} of settings.ini) is missing from requirements.lock"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} against {requirement}"


def test_lock_holds_plain_pins_that_other_platforms_can_use():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"^(nvidia|cuda|triton)", text, re.MULTILINE)
    assert not re.search(r"^[^#].*(://| @ |^-e)", text, re.MULTILINE)


def test_locked_versions_run_on_the_oldest_python():
    """Of the packages installed at their locked version: Debian 12, say, has Python 3.11.2."""
    pins, oldest = locked(), settings()["min_python"] + ".0"
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions_installed()}
    checked = {name: each for name, each in installed.items() if pins.get(name) == each.version}
    assert len(checked) > 100
    needs = {name: each.metadata["Requires-Python"] or "" for name, each in checked.items()}
    assert {name: need for name, need in needs.items() if not SpecifierSet(need).contains(oldest)} == {}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_are_declared(path):
    source = path.read_text()
    base, repro = required("requirements").keys(), required("repro_requirements").keys()
    assert distributions(imported(source, top_level_only=True)) <= base
    assert distributions(imported(source, top_level_only=False)) <= base | repro


def test_extras_of_the_build_are_those_of_settings():
    capture = "import setuptools, json; setuptools.setup = lambda **given: print(json.dumps(given))"
    done = python(f"{capture}\n__file__ = 'setup.py'\nexec(open('setup.py').read())")
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert built["install_requires"] == settings()["requirements"].split()
    assert set(built["extras_require"]) == {"stream", "repro", "dev"}
    assert built["version"] == settings()["version"]


def test_version_is_written_once_in_effect():
    import clmae

    assert clmae.__version__ == settings()["version"]
    assert f"version: {clmae.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"[{clmae.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- what it imports


def test_import_clmae_is_light():
    done = python(
        "import sys, clmae; print([m for m in ('torch', 'numpy', 'dvc', 'nbdev') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_unknown_attribute_is_an_attribute_error():
    import clmae

    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        clmae.lod  # noqa: B018


def test_every_module_imports_without_the_tools():
    """A training machine has neither DVC nor Jupyter nor nbdev."""
    code = """
import importlib, sys
tools = "nbdev fastcore execnb dvc dvclive papermill nbconvert nbformat nbclient jupyterlab ipykernel IPython"
sys.modules.update(dict.fromkeys(tools.split()))  # None: importing it raises
for name in sys.argv[1:]:
    importlib.import_module("clmae." + name)
"""
    names = [path.stem for path in MODULES if path.stem != "__main__"]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_figures_need_no_torch():
    done = python("import sys, clmae.figures; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stdout + done.stderr[-2000:]


def upward(path: Path, source: str) -> set[str]:
    """Imports of `path` that point at itself or at a module below it."""
    ours = {
        name.split(".")[1] for name in imported(source, top_level_only=False) if name.startswith("clmae.")
    }
    above = ORDER[: ORDER.index(path.stem)]
    return {name for name in ours if name in ORDER and name not in above}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_import_points_upward(path):
    assert path.stem in ORDER, f"give clmae/{path.name} its place in ORDER (tests/test_package.py)"
    assert upward(path, path.read_text()) == set()


def test_an_upward_import_is_seen():
    assert upward(Path("losses.py"), "def f():\n    from clmae.trainer import fit") == {"trainer"}
    assert upward(Path("losses.py"), "from clmae import objectives") == {"objectives"}
    assert upward(Path("losses.py"), "from .mae import MAE\nfrom .objectives import Loss") == {"objectives"}
    assert upward(Path("losses.py"), "import clmae.patches") == set()


DRAWS = re.compile(r"^[^\s#@].*\b(plt\.(subplots|figure|show)|sns\.\w*plot)\(", re.MULTILINE)


def pictureless(notebook: dict) -> list[str]:
    """First lines of the cells that draw when they are run, and show no picture as they are committed."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["source"]]
    seen = [cell for cell in cells if not cell["source"][0].startswith("#| hide")]
    drawing = [cell for cell in seen if DRAWS.search("".join(cell["source"]))]
    shown = [any("image/png" in out.get("data", {}) for out in cell["outputs"]) for cell in drawing]
    return [cell["source"][0] for cell, there in zip(drawing, shown) if not there]


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_cells_that_draw_are_committed_with_their_pictures(path):
    """A notebook that was run with another backend than its own has lost them."""
    assert pictureless(json.loads(path.read_text(encoding="utf-8"))) == []


def test_a_lost_picture_is_seen():
    cell = {"cell_type": "code", "source": ["fig, ax = plt.subplots()\n", "ax.plot([1, 2]);"], "outputs": []}
    assert pictureless({"cells": [cell]}) == [cell["source"][0]]
    cell["outputs"] = [{"data": {"image/png": ""}}]
    assert pictureless({"cells": [cell]}) == []
