"""Trains small objectives in as many processes as were launched; `test_distributed` compares the weights.

    python -m torch.distributed.run --nproc-per-node 2 --standalone tests/many.py FOLDER RECIPE[@SLICES] ...

Weights and history go to FOLDER/RECIPE.json, checkpoints to FOLDER/work-RECIPE if FOLDER/work exists. A file
FOLDER/kill-RANK-RECIPE holds the step at which that process kills itself, FOLDER/ask-RANK-RECIPE one at
which it is asked to stop.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from clmae import files, trainer
from clmae.config import Stopped, UserError
from clmae.mae import build_mae
from clmae.objectives import make_objective, objectives

TOKEN = {"depth": 1, "heads": 2, "head": "token"}
CHANCE = {"temperature": 0.5, "masker": TOKEN}
SMALL = {"masker": {"depth": 1, "heads": 2}}
RECIPES = {name: (name, SMALL if "cl_" in name else {}) for name in objectives} | {
    "rank, reach": (
        "cl_mae", {"estimator": "rank", "share": 0.8, "masker": {**TOKEN, "reach": 1, "every": 3}}
    ),
    "rank, pairs": ("cl_mae", {"estimator": {"name": "rank", "loss": "pairs"}, **CHANCE}),
    "rank, few": ("cl_mae", {"estimator": "rank", "masker": {**TOKEN, "fraction": 0.25}}),
    "policy": ("cl_mae", {"estimator": "policy", **CHANCE}),
    "soft, few": (
        "cl_mae", {"kl": "released", "reconstruction": "released", "masker": {**TOKEN, "fraction": 0.6}}
    ),
    "soft parts": ("cl_emae", {"diversity": "released", "relaxation": "scale", "masker": TOKEN}),
    "policy parts": ("cl_emae", {"estimator": "policy", "grouping": "deal", **CHANCE}),
    "excess": ("cl_rc_emae", {"estimator": "rank", "excess": True, **CHANCE}),
    "excess, different": (
        "cl_rc_mae", {"estimator": "rank", "excess": True, "teacher": {"mask": "different"}, **CHANCE}
    ),
    "different": ("rc_mae", {"teacher": {"mask": "different"}}),
    "hard": ("mae", {"mask": {"name": "hard", "end": 0.9, "momentum": 0.5}}),
}  # fmt: skip


class Noise:
    """48 images of smooth noise in batches of 12; a function of the step, as the trainer asks."""

    batch_size, steps_per_epoch = 12, 4

    def __init__(self, folder: Path, who: str):
        coarse = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.images = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")
        self.kill, self.ask = (self.step_of(folder / f"{word}-{who}") for word in ("kill", "ask"))

    def step_of(self, path: Path) -> int:
        return int(path.read_text()) if path.exists() else -1

    def rows(self, step, start, stop):
        if step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.ask:
            os.kill(os.getpid(), signal.SIGTERM)
        first = (step % self.steps_per_epoch) * self.batch_size
        return self.images[first + start : first + stop]


def cook(recipe: str):
    name, settings = RECIPES[recipe]
    torch.manual_seed(0)
    sizes = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return make_objective(build_mae(16, 4, width=16, depth=1, heads=2, **sizes), name, **settings)


def train(recipe: str, folder: Path, fabric, accumulate: int = 1) -> None:
    """20 steps; what became of it goes to a file."""
    objective = cook(recipe)
    work = folder / f"work-{recipe}" if (folder / "work").exists() else None
    settings = {"steps": 20, "rate": 3e-3, "clip": 1.0, "accumulate": accumulate}
    history = trainer.fit(
        objective, Noise(folder, f"{fabric.global_rank}-{recipe}"), folder=work, fabric=fabric, **settings
    )
    ends = torch.cat([value.double().flatten() for value in objective.state_dict().values()])
    everywhere = fabric.all_gather(ends).view(-1, len(ends))
    assert (everywhere == ends).all(), "the processes end with different weights"
    if fabric.global_rank == 0:
        files.write_json(folder / f"{recipe}.json", {"weights": ends, "history": history})


def main(folder: str, recipes: list[str]) -> int:
    """0: done; 2: a clear line on stderr."""
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # torchrun's, to whoever is left: it shall say its line first
    torch.set_num_threads(1)
    fabric = trainer.launch("cpu", "64")
    for recipe in recipes:
        recipe, _, accumulate = recipe.partition("@")
        try:
            train(recipe, Path(folder), fabric, int(accumulate or 1))
        except Stopped as stopped:
            sys.stderr.write(f"clmae: {stopped}\n")  # one write: the others share the pipe
        except UserError as error:
            sys.stderr.write(f"clmae: error: {error}\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
