"""The scripts behind `make check` and `make record` notice what they are there for."""

import hashlib
import json
import runpy
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, root: Path) -> dict:
    """The functions of .ci/NAME.py, at work on another top folder."""
    functions = runpy.run_path(str(ROOT / ".ci" / f"{name}.py"))
    functions["main"].__globals__.update(ROOT=root, COPY=root / "build" / "check")
    return functions


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project of one notebook, exported and clean."""
    top = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "pyproject.toml", ".gitignore"):
        shutil.copy2(ROOT / name, top / name)
    cells = ["#| default_exp a", "#| export\ndef double(x):\n    return 2 * x", "assert double(2) == 4"]
    notebook = new_notebook(cells=[new_code_cell(cell, id=f"cell{i}") for i, cell in enumerate(cells)])
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook.metadata["kernelspec"] = kernel
    (top / "nbs").mkdir()
    (top / "clmae").mkdir()
    shutil.copy2(ROOT / "clmae/__init__.py", top / "clmae/__init__.py")
    nbformat.write(notebook, top / "nbs/00_a.ipynb")
    subprocess.run(["git", "init", "-q"], cwd=top, check=True)
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([command], cwd=top, check=True, capture_output=True)
    return top


@pytest.fixture
def restored(project):
    """The project, put back as it was after a test has spoilt it."""
    before = {
        path: path.read_bytes() for folder in ("nbs", "clmae") for path in (project / folder).glob("*.*")
    }
    yield project
    for path, data in before.items():
        path.write_bytes(data)


def test_a_good_project_passes_and_is_not_touched(project):
    checks = script("check", project)
    before = {path: path.stat().st_mtime_ns for path in project.glob("[nc]*/*.*")}
    assert [checks[name]() for name in ("clean", "exported", "formatted", "linted", "small")] == [[]] * 5
    assert {path: path.stat().st_mtime_ns for path in project.glob("[nc]*/*.*")} == before


def test_a_notebook_with_leftovers_is_named(restored):
    path = restored / "nbs/00_a.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[2].execution_count = 7
    nbformat.write(notebook, path)
    assert script("check", restored)["clean"]() == ["nbs/00_a.ipynb"]


def test_an_edited_module_is_named(restored):
    path = restored / "clmae/a.py"
    path.write_text(path.read_text().replace("2 * x", "3 * x"))
    checks = script("check", restored)
    assert checks["clean"]() == [] and checks["exported"]() == ["clmae/a.py"]


def test_a_module_whose_notebook_is_gone_is_named(restored):
    left = restored / "clmae/b.py"
    left.write_text((restored / "clmae/a.py").read_text().replace("00_a", "00_b"))
    checks = script("check", restored)
    checks["clean"]()
    assert checks["exported"]() == ["clmae/b.py"]
    left.unlink()


def test_style_and_size_are_noticed(restored):
    (restored / "clmae/a.py").write_text("import os\n")
    path = restored / "nbs/00_a.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[2].source = "assert  double( 2 )==4\n# " + "x" * 500_000
    nbformat.write(notebook, path)
    checks = script("check", restored)
    assert any("F401" in line for line in checks["linted"]())
    assert any("00_a.ipynb" in line for line in checks["formatted"]())
    assert checks["small"]() == ["nbs/00_a.ipynb: 501 kB"]


def test_results_of_other_code_are_noted(restored):
    module = restored / "clmae/a.py"
    md5 = hashlib.md5(module.read_bytes()).hexdigest()
    folder = {"path": "build/prepared", "md5": "0.dir"}  # not one file, not looked at
    lock = {"stages": {"pretrain": {"deps": [{"path": "clmae/a.py", "md5": md5}, folder]}}}
    (restored / "dvc.lock").write_text(json.dumps(lock))
    assert script("check", restored)["behind"]() == []
    module.write_text(module.read_text() + "\n# more\n")
    assert script("check", restored)["behind"]() == ["clmae/a.py has changed since"]
    (restored / "dvc.lock").unlink()


def test_times_are_recorded_with_the_machine(tmp_path):
    timings = tmp_path / "build/timings"
    timings.mkdir(parents=True)
    (timings / "prepare.json").write_text('{"seconds": 1.26}')
    (timings / "pretrain-mae-0.json").write_text('{"seconds": 10.0}')
    (timings / "mae-0.json").write_text('{"seconds": 8.0, "steps": 100}')
    times = json.loads(script("record", tmp_path)["record"](tmp_path).read_text())
    assert times["stages"] == {"prepare": 1.3, "pretrain-mae-0": 10.0}
    assert times["pretraining"] == {"mae-0": 8.0} and times["total"] == 11.3
    assert times["machine"]["cores"] >= 1 and times["machine"]["cpu"] and times["versions"]["torch"]


def test_nothing_to_record_is_one_line(tmp_path, capsys):
    assert script("record", tmp_path)["main"]() == 1
    assert capsys.readouterr().err == "clmae: error: no times in build/timings; run make repro first\n"


# ---- what a killed DVC leaves


@pytest.mark.parametrize("text, goes", [("", True), ('{"a": {"re', True), ("{}", False), (None, False)])
def test_half_a_note_of_dvc_goes_and_a_whole_one_stays(text, goes, tmp_path, capsys):
    note = tmp_path / ".dvc/tmp/rwlock"
    note.parent.mkdir(parents=True)
    if text is not None:
        note.write_text(text)
    mend = runpy.run_path(str(ROOT / ".ci" / "mend.py"))["mend"]
    assert mend(tmp_path, pause=0) is goes
    assert note.exists() is (text is not None and not goes)
    assert ("removed .dvc/tmp/rwlock" in capsys.readouterr().err) is goes
