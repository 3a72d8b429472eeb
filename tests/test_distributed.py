"""N processes are one process with the same batch: in weights, history, resuming, stopping and dying."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import many
import numpy as np
import pytest
import torch
from PIL import Image
from toyrepo import make_repository

from clmae import shards, trainer
from clmae.config import UserError, parse, read_params
from clmae.files import read_json, read_tensors
from clmae.objectives import objectives

ROOT = Path(__file__).resolve().parent.parent
STOPPED = ("rank, few", "soft, few")
CUT = {"cl_mae@3", "policy@2", "excess, different@2", "hard@2"}  # in micro-batches
EVERYTHING = sorted(set(many.RECIPES) - {name.partition("@")[0] for name in CUT}) + sorted(CUT)


def torchrun(count: int) -> list[str]:
    """Python's arguments for so many processes here, whatever this machine's name leads to."""
    here = ["--standalone", "--local-addr", "127.0.0.1"]
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *here]


def loopback() -> dict[str, str]:
    """The environment, with gloo on the loopback device."""
    return os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


def launch(folder: Path, count: int, *recipes: str) -> subprocess.CompletedProcess:
    """`recipes` in `count` processes."""
    command = [sys.executable, *torchrun(count), str(ROOT / "tests/many.py"), str(folder), *recipes]
    return subprocess.run(command, cwd=ROOT, env=loopback(), capture_output=True, text=True, timeout=900)


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
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert trainer.launched() == found


# ---- the command

TOY = {
    "runs": ["cl_mae"],
    "data": {"image_size": 32},
    "model": {"patch_size": 4, "width": 16, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1},
    "train": {"epochs": 4, "equal": "images", "batch_size": 16, "base_lr": 3.2e-2, "threads": 1,
              "monitor_epochs": 1},
    "film": {"images": 1, "moments": 3, "average_over": 4},
    "evaluate": {"k": 5},
}  # fmt: skip
# 16 steps of CL-MAE as committed, four an epoch; the largest rate is 3.2e-2 · 16 / 256, which is also about
# the most that a step of AdamW moves a weight.
STEP = 2e-3


def small_repository(folder: Path, shared: dict) -> Path:
    """Prepared noise and the run `cl_mae`; the section `shards` as given."""
    blocks = {"cl_mae": read_params(ROOT / "params.yaml").objectives["cl_mae"]}
    folder.mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    make_repository(folder, parse(TOY | {"objectives": blocks, "shards": shared}), side=32)
    return folder


def write_shards(folder: Path) -> dict:
    """Shards of 96 images of noise; a section `shards` that reads them in two lanes."""
    rng = np.random.default_rng(1)
    for i in range(96):
        path = folder / "photos" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    shards.shard(folder / "photos", folder / "tars", per_shard=16, image_size=(32, 32))
    return {"urls": f"{folder}/tars/train-*.tar", "lanes": 2, "buffer": 16, "workers": 1}


def pretrain(folder: Path, *launcher: str) -> subprocess.CompletedProcess:
    """`clmae pretrain` in a repository, by this Python or a launcher; its progress goes to a file there."""
    environ = loopback() | {"PYTHONPATH": str(ROOT), "CLMAE_PROGRESS": str(folder / "progress")}
    command = [sys.executable, *launcher, "-m", *["--"][: len(launcher)], "clmae", "pretrain"]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=900)


TWO = torchrun(2)


@pytest.fixture(scope="module", params=["prepared", "shards"])
def command(request, tmp_path_factory):
    """A repository pretrained by the command in one process, one by two, and what the commands said."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "shards":
        pytest.importorskip("webdataset")
    shared = write_shards(folder) if request.param == "shards" else {}
    one, two = (small_repository(folder / name, shared) for name in ("one", "two"))
    return one, two, pretrain(one), pretrain(two, *TWO)


def read(top: Path) -> tuple[dict, np.ndarray, list[dict]]:
    """What a run has left: the encoder without its block's key biases, these, and its history's numbers."""
    weights = read_tensors(top / "build/runs/cl_mae-0/encoder.safetensors")
    query, key, value = np.split(weights.pop("trunk.blocks.0.attn.qkv.bias"), 3)
    lines = read_json(top / "build/runs/cl_mae-0/history.json")
    numbers = [{k: v for k, v in line.items() if not isinstance(v, str)} for line in lines]
    return weights | {"query bias": query, "value bias": value}, key, numbers


def test_the_command_in_two_processes_trains_the_same_encoder(command):
    """In float32, the only full precision that parameters offer.

    A gradient is a sum in another order: it differs by some 1e-7 of itself, and a step with it. So a weight
    up to 1 differs in its last digit, 6e-8, for each of 16 steps at most: 1e-6, a 2000th of one step. The
    biases of attention's keys, which no softmax sees, have a gradient of nothing but rounding; AdamW makes a
    small part of a step of it, and they get a whole one.
    """
    one, two, *done = command
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "warn" not in done[1].stderr.lower(), done[1].stderr
    (weights, key, lines), (ours, our_key, our_lines) = read(one), read(two)
    assert weights.keys() == ours.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=STEP / 2000, err_msg=name)
    np.testing.assert_allclose(our_key, key, rtol=0, atol=STEP)
    assert np.abs(weights["patch_embed.proj.bias"]).max() > 3 * STEP  # which began at 0
    assert len(lines) == len(our_lines) == 4
    for line, ours in zip(lines, our_lines):
        assert ours == pytest.approx(line, rel=0, abs=1e-5)


def said(top: Path, done: subprocess.CompletedProcess) -> tuple[list[str], int]:
    """Epoch and step of each line that a monitor wrote, and how often progress came to the last step."""
    epochs = [line.split(" · loss")[0] for line in done.stdout.splitlines()]
    return epochs, (top / "progress").read_text().count("step 16/16 ·")


def files(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}


def test_the_command_in_two_processes_speaks_and_writes_once(command):
    one, two, alone, both = command
    epochs = [f"epoch {n:3d} · step {4 * n:5d}" for n in (1, 2, 3, 4)]
    assert said(one, alone) == said(two, both) == (epochs, 1)
    left = files(two)
    assert left == files(one) and "build/runs/cl_mae-0/film.safetensors" in left
    assert not list((two / "build/work").iterdir())
    steps = (two / "results/curves/cl_mae-0/plots/metrics/step.tsv").read_text().split("\n")
    assert [line.split("\t")[-1] for line in steps[1:] if line] == ["4", "8", "12", "16"]
