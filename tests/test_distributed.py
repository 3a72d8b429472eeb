"""N processes are one process with the same batch: in weights, history, resuming, stopping and dying."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import many
import pytest
import torch

from clmae import trainer
from clmae.config import UserError
from clmae.objectives import objectives

ROOT = Path(__file__).resolve().parent.parent
STOPPED = ("rank, few", "soft, few")
CUT = {"cl_mae@3", "policy@2", "excess, different@2", "hard@2"}  # in micro-batches
EVERYTHING = sorted(set(many.RECIPES) - {name.partition("@")[0] for name in CUT}) + sorted(CUT)


def launch(folder: Path, count: int, *recipes: str) -> subprocess.CompletedProcess:
    """`recipes` in `count` processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    command = [*run, str(ROOT / "tests/many.py"), str(folder), *recipes]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def alone(folder: Path, *recipes: str) -> None:
    """`recipes` in this process."""
    folder.mkdir(exist_ok=True)
    for recipe in recipes:
        name, _, accumulate = recipe.partition("@")
        many.train(name, folder, trainer.make_fabric("cpu", "64"), int(accumulate or 1))


def assert_same(one: Path, other: Path, recipe: str) -> None:
    name = recipe.partition("@")[0]
    here, there = (json.loads((folder / f"{name}.json").read_text()) for folder in (one, other))
    torch.testing.assert_close(
        *(torch.tensor(found["weights"], dtype=torch.float64) for found in (here, there)), rtol=0, atol=1e-9
    )
    assert len(here["history"]) == len(there["history"])
    for line, again in zip(here["history"], there["history"]):
        assert line == pytest.approx(again, rel=0, abs=1e-9)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process makes of everything."""
    folder = tmp_path_factory.mktemp("one")
    alone(folder, *EVERYTHING)
    return folder


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """What two processes make of it, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, 2, *EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    return folder


def test_every_objective_is_tried():
    assert set(objectives) <= {recipe.partition("@")[0] for recipe in EVERYTHING}


@pytest.mark.parametrize("recipe", EVERYTHING)
def test_two_processes_are_one(recipe, single, double):
    assert_same(single, double, recipe)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A launch of two processes: in one recipe the second is asked to stop at step 9, in one killed at 10."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "work").mkdir()
    (folder / "ask-1-rank, few").write_text("9")
    (folder / "kill-1-soft, few").write_text("10")
    return folder, launch(folder, 2, *STOPPED)


def test_one_is_asked_to_stop_and_all_do_after_the_same_step(broken):
    folder, done = broken
    said = [line for line in done.stderr.splitlines() if "stopped by" in line]
    assert said == 2 * [
        "clmae: stopped by SIGTERM after step 11 of 20, which is saved; run the same to go on"
    ]
    assert not (folder / "rank, few.json").exists()
    assert (folder / "work-rank, few/step-11.json").exists()


def test_one_is_killed_and_all_stop_with_a_clear_line(broken):
    folder, done = broken
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("clmae: error:")]
    assert len(told) == 1 and "process 0 of 2: another process of this run has ended" in told[0]
    assert (folder / "work-soft, few/step-8.json").exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_goes_on(count, broken, single, tmp_path):
    for work in broken[0].glob("work*"):
        shutil.copytree(work, tmp_path / work.name)
    if count == 1:
        alone(tmp_path, *STOPPED)
    else:
        done = launch(tmp_path, count, *STOPPED)
        assert done.returncode == 0, done.stderr
    for recipe in STOPPED:
        assert_same(single, tmp_path, recipe)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="12 images don't divide by 1 processes times train.accumulate 5; take 10 or 15"
    ):
        alone(tmp_path, "mae@5")
    with pytest.raises(
        UserError, match="32 images don't divide by 3 processes times train.accumulate 2; take 30 or 36"
    ):
        trainer.check_division(32, 2, 3)


def test_a_single_device_is_no_place_for_many(monkeypatch):
    monkeypatch.setattr(trainer, "launched", lambda: (2, 2))
    with pytest.raises(UserError, match="'cuda:1' is one device for 2 processes; use cuda or cpu"):
        trainer.launch("cuda:1")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, (1, 1)),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (8, 4)),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_STEP_NUM_TASKS": "8"}, (8, 4)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, (1, 1)),  # the batch script itself
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_NAME": "interactive"}, (1, 1)),
    ],
)
def test_launchers_are_understood(said, found, monkeypatch):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert trainer.launched() == found
