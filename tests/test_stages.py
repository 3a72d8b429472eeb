"""dvc.yaml against what the stages are: their notebooks, modules, parameters and files."""

import ast
import json
import re
from pathlib import Path

import pytest

from clmae.config import Config, read_params, read_yaml
from clmae.pipeline import chosen, parameter_names, stage_notebook

ROOT = Path(__file__).resolve().parent.parent
STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]


def ours(source: str) -> set[str]:
    """Modules of clmae that Python code imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "clmae" if node.level else ""
            whole = ".".join(filter(None, [package, node.module]))
            found |= {f"{whole}.{alias.name}" for alias in node.names} | {whole}
    names = {name.split(".")[1] for name in found if name.startswith("clmae.")}
    return {name for name in names if (ROOT / f"clmae/{name}.py").exists()}


def code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def needed(notebook: Path) -> set[str]:
    """The modules a notebook needs, directly and through others, as paths."""
    todo, done = ours(code(notebook)), set()
    while todo:
        name = todo.pop()
        done.add(name)
        todo |= ours((ROOT / f"clmae/{name}.py").read_text()) - done
    return {f"clmae/{name}.py" for name in done}


def paths(entries) -> list[str]:
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outs(stage) -> dict[str, dict]:
    entries = [*stage["outs"], *stage.get("metrics", []), *stage.get("plots", [])]
    return {k: v or {} for e in entries for k, v in (e if isinstance(e, dict) else {e: {}}).items()}


stages = pytest.mark.parametrize("name", STAGES)


@stages
def test_stage_names_exactly_the_modules_its_notebook_imports(name):
    listed = [path for path in paths(STAGES[name]["deps"]) if path.startswith("clmae/")]
    assert len(listed) == len(set(listed))
    assert set(listed) == needed(stage_notebook(name, ROOT))


@stages
def test_stage_depends_on_its_notebook_and_leaves_it_executed(name):
    notebook = stage_notebook(name, ROOT)
    assert f"nbs/stages/{notebook.name}" in paths(STAGES[name]["deps"])
    which = "-${item.run}-${item.seed}" if "matrix" in STAGES[name] else ""
    assert f"results/notebooks/{notebook.stem}{which}.ipynb" in outs(STAGES[name])


@stages
def test_stage_is_handed_exactly_the_parameters_it_depends_on(name):
    cmd = STAGES[name]["cmd"]
    assert cmd.startswith(f"python -m clmae stage {name} ")
    assert re.findall(r"-P (\S+)", cmd) == STAGES[name]["params"]
    options = "--run ${item.run} --seed ${item.seed}"
    assert (options in cmd) == ("matrix" in STAGES[name])


@stages
def test_notebook_has_every_parameter_it_is_handed_and_no_other(name):
    config = read_params(ROOT / "params.yaml")
    keys = [key.replace("${item.run}", config.runs[0]) for key in STAGES[name]["params"]]
    extra = {"run": "mae", "seed": 0} if "matrix" in STAGES[name] else {}
    notebook = json.loads(stage_notebook(name, ROOT).read_text())
    assert set(chosen(config, keys, **extra)) == parameter_names(notebook)


@stages
def test_results_are_kept_in_git_the_rest_is_never_pushed_and_earlier_ones_stay_until_replaced(name):
    for path, options in outs(STAGES[name]).items():
        if path.startswith("results/"):
            assert options == {"cache": False, "persist": True}, path
        else:
            assert path.startswith("build/") and options == {"push": False, "persist": True}, path


def test_every_stage_notebook_is_a_stage():
    notebooks = {path.stem.partition("_")[2] for path in (ROOT / "nbs/stages").glob("*.ipynb")}
    assert notebooks == set(STAGES)


def test_matrices_are_all_runs_and_seeds():
    every = {"run": "${runs}", "seed": "${seeds}"}
    assert {name for name in STAGES if STAGES[name].get("matrix") == every} == {"pretrain", "evaluate"}
    assert all(stage.get("matrix") in (None, every) for stage in STAGES.values())


def test_params_yaml_spells_out_every_key_in_order():
    written = read_yaml(ROOT / "params.yaml")
    assert list(written) == list(Config.model_fields)
    for name, section in written.items():
        fields = getattr(Config.model_fields[name].annotation, "model_fields", None)
        if fields:
            assert list(section) == list(fields), name


def test_every_way_to_import_a_module_is_seen():
    source = "from .vit import Trunk\nimport clmae.mae\nfrom clmae import data, __version__\nimport numpy"
    assert ours(source) == {"vit", "mae", "data"}
