"""Killed at random moments (SIGKILL) and started again, a run ends as if nothing had happened.

A server process imports everything once and forks a fresh process for each attempt, so many fit into seconds.
"""

import json
import multiprocessing
import random
import time

import pytest
import torch

from clmae import files, trainer
from clmae.mae import build_mae
from clmae.objectives import make_objective

STEPS = 36
OBJECTIVES = {"cl_mae": {"masker": {"depth": 1, "heads": 2, "every": 2}}, "rc_mae": {}}
both = pytest.mark.parametrize("name", OBJECTIVES)


class Noise:
    """24 images of noise in batches of 4; a function of the step, as the trainer asks."""

    batch_size, steps_per_epoch = 4, 6

    def __init__(self):
        self.images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def rows(self, step, start, stop):
        first = (step % self.steps_per_epoch) * self.batch_size
        return self.images[first + start : first + stop]


def train(name, folder, minutes):
    """One attempt: go on from the newest checkpoint; if it comes to the end, leave weights and history."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mae = build_mae(16, 4, width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
    objective = make_objective(mae, name, **OBJECTIVES[name])
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    (folder / "begun").touch()
    with files.Lock(work / "lock", "a run"):  # outlives no process: a kill must not lock the next one out
        history = trainer.fit(objective, Noise(), steps=STEPS, rate=3e-3, folder=work, minutes=minutes)
    files.write_tensors(folder / "weights.safetensors", objective.state_dict())
    files.write_json(folder / "history.json", history)


@pytest.fixture(scope="module")
def processes():
    """Where attempts come from: a server with the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clmae.trainer", "clmae.objectives"])
    return context


def begin(processes, name, folder, minutes=1e-9):
    """An attempt whose training is about to begin."""
    (folder / "begun").unlink(missing_ok=True)
    process = processes.Process(target=train, args=(name, folder, minutes))
    process.start()
    while process.is_alive() and not (folder / "begun").exists():
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def peaceful(processes, tmp_path_factory):
    """Each objective trained in one go, and the seconds that took."""
    ends = {}
    for name in OBJECTIVES:
        folder = tmp_path_factory.mktemp(name)
        process, began = begin(processes, name, folder), time.monotonic()
        process.join()
        assert process.exitcode == 0
        ends[name] = folder, time.monotonic() - began
    return ends


def newest(folder):
    """The newest step saved, 0 if there is none."""
    steps = [int(path.stem[5:]) for path in (folder / "work").glob("step-*.json")]
    return max(steps, default=0)


def attempts(processes, name, folder, kills, seconds):
    """Kill up to `kills` attempts, each after a random time, then let one come to its end.

    For each kill the newest step saved, and whether it came while a checkpoint was being written.
    """
    chance, told = random.Random(f"{name} {kills}"), []
    while len(told) < kills and not (folder / "history.json").exists():
        process, before = begin(processes, name, folder), newest(folder)
        while told and process.is_alive() and newest(folder) == before:  # a slow machine gets further, too
            time.sleep(0.005)
        process.join(chance.uniform(0, 1) * seconds)
        process.kill()
        process.join()
        whole = [path.stem for path in (folder / "work").glob("step-*.json")]
        pieces = [path for path in (folder / "work").glob("*step-*.safetensors*") if path.stem not in whole]
        told.append((newest(folder), bool(pieces)))
    last = begin(processes, name, folder, None)
    last.join()
    assert last.exitcode == 0
    return told


def same_end(folder, other):
    """The same bytes of weights, the same lines of history, none lost or doubled."""
    for file in ("weights.safetensors", "history.json"):
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file
    steps = [line["step"] for line in json.loads((folder / "history.json").read_text())]
    assert steps == list(range(6, STEPS + 1, 6))


@both
def test_killed_now_and_then(name, processes, peaceful, tmp_path):
    other, seconds = peaceful[name]
    saved = [step for step, _ in attempts(processes, name, tmp_path, 4, seconds / 3)]
    assert saved == sorted(saved) and saved[-1] > 0
    same_end(tmp_path, other)
    left = sorted(p.name for p in (tmp_path / "work").iterdir())
    assert len(left) == 4 and left[2:] == [f"step-{STEPS}.json", f"step-{STEPS}.safetensors"]  # no litter


@pytest.mark.long
@both
def test_killed_at_thirty_moments(name, processes, peaceful, tmp_path):
    other, seconds = peaceful[name]
    told = []
    while len(told) < 30:  # a run that is done before it was killed often enough is begun again
        folder = tmp_path / str(len(told))
        folder.mkdir()
        told += attempts(processes, name, folder, 30 - len(told), seconds / 8)
        same_end(folder, other)
    assert len({step for step, _ in told}) > 5 and any(writing for _, writing in told)
