"""The commands a newcomer types, on a copy without an environment: what they print, make and leave alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()) - {"given"}
INTERPRETER = f"exec {sys.executable!r}"
# a stand-in for Python that "makes" an environment by planting itself there
PLANT = 'case "$*" in "-m venv"*) mkdir -p build/venv/bin && cp "$0" build/venv/bin/python ;; esac\n'


@pytest.fixture
def clone(tmp_path) -> Path:
    """What `make` reads before there is an environment, and nothing else."""
    for name in ("Makefile", "settings.ini", "requirements.lock"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    return tmp_path


def make(where: Path, *arguments, path: Path | None = None) -> subprocess.CompletedProcess:
    env = {
        k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV"}
    }
    if path:
        env["PATH"] = f"{path}:{env['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=where, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def said(done: subprocess.CompletedProcess) -> list[str]:
    """What a failed command says, without make's own line about it."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if not re.match(r"make(\[\d+\])?: \*\*\*", line)]


def test_help_is_the_default_and_lists_every_command(clone):
    bare, asked = make(clone), make(clone, "help")
    assert bare.returncode == 0 and bare.stdout == asked.stdout
    listed = re.findall(r"^  make ([\w-]+) +\S.*$", bare.stdout, re.MULTILINE)
    assert len(listed) == len(set(listed)) and set(listed) == TARGETS


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "README.md", ".ci/run"])
def test_documents_name_only_commands_that_exist(document):
    named = re.findall(
        r"(?:`|^|\"|; )make (?:--\S+ )?(?:[A-Z]+=\S+ )?([a-z]+)", (ROOT / document).read_text(), re.M
    )
    assert named and set(named) <= TARGETS


def test_missing_venv_is_one_line_that_names_the_package(clone):
    script(clone / "bin/python3", f'case "$*" in *ensurepip*) exit 1 ;; *) {INTERPRETER} "$@" ;; esac')
    lines = said(make(clone, "test", path=clone / "bin"))
    assert len(lines) == 1
    assert "python3-venv" in lines[0] and f"python3.{sys.version_info[1]}-venv" in lines[0]
    assert not (clone / "build").exists()


def test_old_python_is_one_line_that_says_what_is_needed(clone):
    script(clone / "bin/python3", 'case "$*" in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    (line,) = said(make(clone, "repro", path=clone / "bin"))
    assert "3.11" in line and "Python 3.9.2" in line and "PYTHON=" in line
    assert not (clone / "build").exists()


def test_missing_python_is_one_line(clone):
    (line,) = said(make(clone, "test", "PYTHON=python3.99"))
    assert "python3.99 not found" in line


def test_an_environment_that_lacks_the_tools_is_one_line(clone):
    (line,) = said(make(clone, "test", "VENV=elsewhere"))
    assert "VENV=elsewhere" in line and "pip install -c requirements.lock" in line


def test_the_environment_is_made_once_and_again_when_requirements_change(clone):
    log = clone / "asked"
    script(clone / "bin/python3", f'echo "$*" >> {str(log)!r}\n{PLANT}')

    def installs() -> int:
        return log.read_text().count("pip install")

    for _ in range(2):
        done = make(clone, "record", path=clone / "bin")
        assert done.returncode == 0, done.stderr
    assert installs() == 1
    assert "-c requirements.lock -e .[repro,dev]" in log.read_text()
    with (clone / "settings.ini").open("a") as file:
        file.write("# a new requirement\n")
    assert make(clone, "record", path=clone / "bin").returncode == 0
    assert installs() == 2


def test_a_failed_installation_is_tried_again(clone):
    script(clone / "bin/python3", f'{PLANT}case "$*" in *"pip install"*) exit 1 ;; esac\n')
    for _ in range(2):
        done = make(clone, "record", path=clone / "bin")
        assert done.returncode != 0 and "Making the environment" in done.stdout


def test_the_benchmark_has_an_environment_of_its_own(clone):
    log, wants = clone / "asked", clone / "bench" / "requirements.txt"
    plant = 'case "$*" in "-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;; esac\n'
    script(clone / "bin/python3", f'echo "$*" >> {str(log)!r}\n{plant}')
    wants.parent.mkdir()
    wants.write_text("another-library\n")
    for _ in range(2):
        done = make(clone, "bench", "ASK=--quick", path=clone / "bin")
        assert done.returncode == 0, done.stderr
    assert not (clone / "build/venv").exists()
    assert log.read_text().count("-c requirements.lock -e . -r bench/requirements.txt") == 1
    assert log.read_text().count("-m bench.run --quick") == 2
    os.utime(wants, (2**32, 2**32))  # changed after the environment was made
    assert make(clone, "bench", path=clone / "bin").returncode == 0
    assert log.read_text().count("bench/requirements.txt") == 2


def test_data_is_pulled_only_if_absent(clone):
    log = clone / "asked"
    script(clone / "env/bin/python", f'echo "$*" >> {str(log)!r}\n')
    assert make(clone, "repro", "VENV=env").returncode == 0
    assert "dvc repro" in log.read_text() and "dvc pull" not in log.read_text()
    (clone / "data").rmdir()
    assert make(clone, "repro", "VENV=env").returncode == 0
    assert log.read_text().index("dvc pull data") < log.read_text().rindex("dvc repro")


def test_failing_tests_fail_the_command_and_notebooks_still_run(clone):
    script(clone / "env/bin/python", 'case "$*" in *pytest*--dist*) exit 1 ;; esac\n')
    script(clone / "env/bin/nbdev_test", "echo notebooks ran\n")
    done = make(clone, "test", "VENV=env")
    assert done.returncode != 0 and "notebooks ran" in done.stdout
    script(clone / "env/bin/python", "")
    assert make(clone, "test", "VENV=env").returncode == 0
    script(clone / "env/bin/nbdev_test", "exit 1\n")
    assert make(clone, "test", "VENV=env").returncode != 0


def test_clean_keeps_environment_data_and_results(clone):
    kept = [clone / name for name in ("build/venv/bin/python", "data/train.parquet", "results/metrics.json")]
    gone = [
        clone / name
        for name in ("build/runs/a/b", "build/prepared/train.npy", ".ruff_cache/x", "clmae/__pycache__/x")
    ]
    for path in kept + gone:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for _ in range(2):
        assert make(clone, "clean").returncode == 0
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)
