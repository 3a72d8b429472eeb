"""`python -m clmae`: what a user types, and the one line for each mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clmae import pipeline, runs
from clmae.__main__ import main, parser
from clmae.config import Stopped, UserError, read_yaml

ROOT = Path(__file__).resolve().parent.parent
PARAMS = (ROOT / "params.yaml").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty repository with the committed parameters, as the current folder."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_help_names_every_command_and_needs_no_torch():
    code = "import sys, clmae.__main__ as m; m.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    text = parser().format_help()
    for command in "validate prepare pretrain plan evaluate baselines figures stage readme verify".split():
        assert f"\n    {command}" in text


def test_no_command_shows_how_to_use_it(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2 and "usage: clmae" in capsys.readouterr().err


def test_validate(here, capsys):
    code, out, err = said(capsys, "validate")
    params = read_yaml("params.yaml")
    assert code == 0 and err == "" and f"runs {', '.join(params['runs'])}" in out


@pytest.mark.parametrize(
    "command", ["validate", "prepare", "pretrain", "evaluate", "baselines", "stage prepare"]
)
def test_mistake_in_params_is_one_line_whatever_the_command(here, capsys, command):
    Path("params.yaml").write_text(PARAMS.replace("mask: random", "mask: randm"))
    code, out, err = said(capsys, *command.split())
    assert code == 2 and out == ""
    assert err.startswith("clmae: error: ") and err.count("\n") == 1
    assert "params.yaml: objectives.mae.mask: unknown mask 'randm'; allowed: block, grid," in err
    assert sorted(p.name for p in here.iterdir()) == ["dvc.yaml", "params.yaml"]  # nothing was begun


@pytest.mark.parametrize(
    "command, line",
    [
        ("validate --params nowhere.yaml", "nowhere.yaml: no such file; run where it lies, or name another"),
        (
            "pretrain --run cl_mea",
            "--run: unknown run 'cl_mea'; allowed: cl_emae, cl_mae,",
        ),
        ("evaluate --run x", "--run: unknown run 'x'; allowed: cl_emae, cl_mae,"),
        ("stage pretain", "unknown stage 'pretain'"),
        ("readme --check", "nbs/index.ipynb: no such file"),
        ("prepare", "data: no such folder"),
        ("pretrain", "build/prepared holds no prepared images; run `python -m clmae prepare` first"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(here, capsys, command, line):
    code, _, err = said(capsys, *command.split())
    assert code == 2 and err.startswith("clmae: error: ") and line in err and err.count("\n") == 1


def test_outside_a_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capsys, "stage", "prepare")
    assert code == 2 and "no dvc.yaml here or above; run inside a clone of the repository" in err


def test_failed_stage_tells_its_story_and_exits_one(here, capsys, monkeypatch):
    def fail(*_, **__):
        raise pipeline.StageError("stage x: KeyError in cell 3", "the end\nof a traceback")

    monkeypatch.setattr(pipeline, "run_stage", fail)
    code, _, err = said(capsys, "stage", "x")
    assert code == 1 and err == "the end\nof a traceback\nclmae: error: stage x: KeyError in cell 3\n"


@pytest.mark.parametrize("command, again", [("pretrain", "the same command"), ("stage x", "`dvc repro`")])
def test_interrupt_says_how_to_go_on(here, capsys, monkeypatch, command, again):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_stage", interrupted)
    monkeypatch.setattr(runs, "pretrain_run", interrupted)
    code, _, err = said(capsys, *command.split())
    assert code == 130 and err.strip() == f"clmae: interrupted; {again} continues from the last checkpoint"


def test_asked_to_stop_is_no_failure(here, capsys, monkeypatch):
    line = "stopped by SIGTERM after step 3 of 9, which is saved; run the same to go on"

    def stopped(**_):
        raise Stopped(line)

    monkeypatch.setattr(runs, "pretrain_run", stopped)
    code, _, err = said(capsys, "pretrain")
    assert code == 0 and err.strip() == f"clmae: {line}"


def test_a_mistake_of_ours_keeps_its_traceback(here, monkeypatch):
    def broken(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "pretrain_run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["pretrain"])


def test_runs_and_seeds_are_all_or_the_one_asked_for(here, monkeypatch):
    Path("params.yaml").write_text(PARAMS.replace("seeds: [0]", "seeds: [0, 1]"))
    done = []
    score = {"knn": {"accuracy": 0.5}}
    for name in ("pretrain_run", "evaluate_run"):
        monkeypatch.setattr(runs, name, lambda run, seed, **_: done.append((run, seed)) or score)
    params = read_yaml("params.yaml")
    every = [(run, seed) for run in params["runs"] for seed in params["seeds"]]
    assert main(["pretrain"]) == 0 and done == every
    done.clear()
    assert main(["evaluate", "--seed", "1"]) == 0 and done == [(run, 1) for run in params["runs"]]
    done.clear()
    assert main(["pretrain", "--run", "mae", "--seed", "7"]) == 0 and done == [("mae", 7)]


def test_evaluate_and_baselines_say_what_they_found(here, monkeypatch, capsys):
    found = {"knn": {"accuracy": 0.5123}, "linear": {"accuracy": 0.6}, "width": 128}
    monkeypatch.setattr(runs, "evaluate_run", lambda **_: found)
    monkeypatch.setattr(runs, "baselines_run", lambda **_: {"pca": found, "pixels": {"skipped": "no labels"}})
    assert said(capsys, "evaluate", "--run", "mae")[1] == "mae-0: knn 51.2 %, linear 60.0 %\n"
    assert said(capsys, "baselines")[1] == "pca: knn 51.2 %, linear 60.0 %\npixels: no labels\n"


def test_pretrain_hands_over_the_sections_and_the_block(here, monkeypatch):
    handed = {}
    monkeypatch.setattr(runs, "pretrain_run", lambda **given: handed.update(given))
    main(["pretrain", "--run", "mae", "--seed", "0"])
    params = read_yaml("params.yaml")
    assert handed["objective"] == params["objectives"]["mae"]
    assert (
        handed["train"].epochs == params["train"]["epochs"]
        and handed["film"].images == params["film"]["images"]
    )


def test_verify_fails_when_results_differ(here, monkeypatch, capsys):
    differences = [pipeline.Difference("m.json", "knn", 0.5, 0.6, "different")]
    for folder in ("a", "b"):
        (here / folder).mkdir()
    monkeypatch.setattr(pipeline, "rebuild", lambda root, work: (here / "a", here / "b"))
    assert said(capsys, "verify")[:2] == (0, "the rebuild has the same bytes as the committed results\n")
    monkeypatch.setattr(pipeline, "compare", lambda *_: differences)
    code, out, _ = said(capsys, "verify")
    assert code == 1 and "m.json knn: 0.5 → 0.6" in out


def test_without_the_extra_a_stage_says_what_to_install(tmp_path):
    (tmp_path / "nbs/stages").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "nbs/stages/10_x.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["train = {}"]}]}'
    )
    block = "import sys; sys.modules['papermill'] = None\n"
    block += "from clmae.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", block, "stage", "x", "-P", "train"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "papermill is not installed, and stages need it: pip install -e '.[repro]'" in done.stderr


def test_user_error_in_python_is_an_ordinary_exception():
    with pytest.raises(UserError):
        pipeline.read_valid("nowhere.yaml")
