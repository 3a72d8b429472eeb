"""`python -m clmae`: what a user types, and the one line for each mistake."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toyrepo import make_repository

from clmae import doctor, pipeline, runs
from clmae.__main__ import main, parser
from clmae.config import Stopped, UserError, parse, read_params, read_yaml

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
    commands = "validate prepare pretrain plan evaluate baselines figures replay doctor bakeoff stage readme"
    for command in f"{commands} verify".split():
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
        ("doctor --run x", "--run: unknown run 'x'; allowed: cl_emae, cl_mae,"),
        ("replay build", "build: no incident.json there; incidents of this repository: none"),
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
    monkeypatch.setattr(pipeline, "run_stage", lambda *_, **__: stopped())
    for command, expected in {"pretrain": 0, "stage x": 2}.items():  # DVC takes 0 for done
        code, _, err = said(capsys, *command.split())
        assert code == expected and err.strip() == f"clmae: {line}"


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
    found = {
        "knn": {"accuracy": 0.5123},
        "linear": {"accuracy": 0.6},
        "width": 128,
        "consistency": {"value": 1.0},
    }
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


def test_doctor_says_what_is_wrong_and_exits_one(here, capsys, monkeypatch):
    code, out, err = said(capsys, "doctor", "--params", "nowhere.yaml")
    assert code == 1 and err == "" and "wrong  parameters  no such file; run where it lies" in out
    assert out.endswith("1 of 6 wrong, 0 to note\n")
    lines = [doctor.Check("ok", "a", "b"), doctor.Check("note", "c", "d")]
    monkeypatch.setattr(doctor, "examine", lambda *given: handed.extend(given) or lines)
    handed = []
    code, out, _ = said(capsys, "doctor", "--run", "mae", "--steps", "7")
    assert code == 0 and handed == ["params.yaml", "mae", 7]
    assert out == "ok     a           b\nnote   c           d\n0 of 2 wrong, 1 to note\n"


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_doctor_measures_a_whole_number_of_steps(capsys, count):
    with pytest.raises(SystemExit):
        main(["doctor", f"--steps={count}"])
    assert f"argument --steps: '{count}' is no whole number >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("again", [True, False])
def test_replay_fails_if_the_incident_does_not_come_back(here, capsys, monkeypatch, again):
    monkeypatch.setattr(doctor, "retake", lambda *given: (again, f"replayed {given}"))
    code, out, _ = said(capsys, "replay", "there", "--device", "cuda:1")
    assert code == (0 if again else 1) and out == "replayed ('there', 'cuda:1')\n"


TOOLS = """dvc dvclive papermill nbdev fastcore execnb nbconvert nbformat nbclient
           jupyterlab jupyter_client jupyter_core notebook ipykernel ipywidgets IPython""".split()
ALONE = [  # with the exit code of each
    ("validate", 0), ("prepare", 0), ("plan --preset tiny --images 10k", 0), ("plan --run mae", 0),
    ("shard data shards", 0), ("doctor --steps 2", 0), ("pretrain", 0), ("evaluate", 0), ("baselines", 0),
    ("figures", 0), ("bakeoff --list", 0),
    ("pretrain --params wild.yaml", 2), ("doctor --params wild.yaml --steps 8", 1), ("replay INCIDENT", 0),
    ("stage prepare", 2),
]  # fmt: skip
ALONE_CODE = """
import glob, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))  # None: importing it raises
from clmae.__main__ import main
for command in sys.argv[2:]:
    [*found] = glob.glob("build/work/*/incident")
    print("exit", main(command.replace("INCIDENT", "".join(found)).split()), command)
"""
TINY = """
runs: [mae]
data: {image_size: 16, min_size: 8, validation: 0.25}
model: {patch_size: 4, width: 32, depth: 1, heads: 2, decoder_width: 16, decoder_depth: 1}
train: {epochs: 2, batch_size: 8, threads: 1, monitor_epochs: 1}
film: {images: 2, moments: 2, average_over: 8}
evaluate: {k: 3, bootstrap: 10, embedding_images: 20}
objectives: {mae: {objective: mae}}
"""


def test_commands_need_neither_dvc_nor_papermill_nor_jupyter(tmp_path):
    """The whole way on a bare machine: every command, with the tools' imports blocked."""
    rng = np.random.default_rng(0)
    for i in range(64):
        place = tmp_path / "data" / ("train" if i < 40 else "test") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (tmp_path / "params.yaml").write_text(TINY)
    (tmp_path / "wild.yaml").write_text(
        TINY.replace("threads: 1", "threads: 1, base_lr: 1.0e+30, warmup: 0.0")
    )
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    commands = [command for command, _ in ALONE]
    done = subprocess.run(
        [sys.executable, "-c", ALONE_CODE, " ".join(TOOLS), *commands],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ends = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert ends == [[str(code), command] for command, code in ALONE], done.stdout + done.stderr
    assert "without dvc and papermill there is no `dvc repro`" in done.stdout
    assert "first operation whose result is not finite" in done.stdout


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


TOY = {
    "runs": ["cl_mae"],
    "data": {"image_size": 32},
    "model": {"patch_size": 4, "width": 16, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1},
    "train": {"epochs": 4, "equal": "images", "batch_size": 16, "threads": 1, "monitor_epochs": 1},
    "film": {"images": 1, "moments": 3, "average_over": 4},
    "evaluate": {"k": 5},
}  # 16 steps of CL-MAE as committed, 4 an epoch


def toy(folder: Path) -> Path:
    """A repository with prepared noise and the run `cl_mae`."""
    folder.mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    blocks = {"cl_mae": read_params(ROOT / "params.yaml").objectives["cl_mae"]}
    make_repository(folder, parse(TOY | {"objectives": blocks}), side=32)
    return folder


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe with no room left: who writes to it waits until it is read."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    for size in (4096, 1):
        try:
            while os.write(into, b"\n" * size):
                pass
        except BlockingIOError:
            pass
    os.set_blocking(into, True)
    return out, into


def left_by(top: Path) -> dict[str, bytes]:
    """What a run leaves for others."""
    places = [top / "build/runs/cl_mae-0", top / "results"]
    found = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(top)): path.read_bytes() for path in found}


def test_a_run_that_is_sent_sigterm_saves_ends_with_zero_and_goes_on(tmp_path):
    """The process is held where it says its first line: after step 4, at the speed of any machine."""
    command = [sys.executable, "-m", "clmae", "pretrain"]
    how = {"text": True, "env": os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}}
    broken, whole = toy(tmp_path / "broken"), toy(tmp_path / "whole")
    out, into = full_pipe()
    with subprocess.Popen(command, cwd=broken, stdout=into, stderr=subprocess.PIPE, **how) as process:
        os.close(into)
        end = time.monotonic() + 300
        try:
            while not list(broken.glob("build/work/cl_mae-0-*/masks-4.safetensors")):  # just before the line
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end, "it never came to the end of an epoch"
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            with open(out) as pipe:
                lines = pipe.read().split("\n")  # to its end: now the process goes on
            said = process.stderr.read()
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, said
    assert [line[:17] for line in lines if line] == ["epoch   1 · step "]
    assert (
        said.strip() == "clmae: stopped by SIGTERM after step 5 of 16, which is saved; run the same to go on"
    )
    [work] = broken.glob("build/work/cl_mae-0-*")
    assert (work / "step-5.json").exists() and not (broken / "build/runs").exists()
    again, once = (subprocess.run(command, cwd=top, capture_output=True, **how) for top in (broken, whole))
    assert again.returncode == once.returncode == 0, again.stderr + once.stderr
    assert re.findall(r"^epoch +(\d)", again.stdout, re.MULTILINE) == ["2", "3", "4"]
    ends = left_by(broken), left_by(whole)
    assert "build/runs/cl_mae-0/encoder.safetensors" in ends[0] and ends[0] == ends[1]
