"""Where the time of a step goes, and what each saving is worth: python -m bench.ladder

Writes results/bench/ladder.json: the profile of our MAE's step by kind of operation, and the ladder from the
textbook's CL-MAE down to ours, all measured in one run, each rung with its operations; what is expected of it
is in bench/claims.json. Savings that the library makes by itself are taken back for a rung of their own,
and one that it doesn't make is put in. `nbs/22_speed.ipynb` draws both.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import clmae.vit
from clmae.config import Config, read_params
from clmae.files import find_root, write_json
from clmae.mae import MAE, Encoder, Prediction
from clmae.teacher import Teacher

from .contestants import Case, Contestant, masked, ours, textbook_mae, textbook_phases
from .record import about, summary
from .run import CASES, PACKAGES, sample

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::convolution_backward", "aten::mkldnn_convolution"),
    "attention": ("scaled_dot_product", "aten::bmm", "softmax"),
    "activation and norm": ("gelu", "layer_norm"),
    "optimizer": ("adamw", "AdamW", "zero_grad"),
    "copies and gathers": ("copy_", "cat", "gather", "scatter", "index", "clone", "fill_", "zero_", "repeat"),
}
UNIT = "MAE, ours"
ORDER = ("median", "low", "high")


def group_of(name: str) -> str:
    """The kind of operation that a name in a profile belongs to."""
    found = (group for group, words in GROUPS.items() if any(word in name for word in words))
    return next(found, "all else")


def shares(contestant: Contestant) -> dict[str, float]:
    """Shares of a step's time by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for phase in contestant.phases.values():
            phase(0)
    total = dict.fromkeys([*GROUPS, "all else"], 0.0)
    for event in seen.key_averages():
        total[group_of(event.key)] += event.self_cpu_time_total
    return {name: round(value / sum(total.values()), 4) for name, value in total.items()}


def profiles(contestant: Contestant, rounds: int) -> dict:
    """Shares of several steps: those of the mean step, and the lowest and highest of each kind."""
    taken = [shares(contestant) for _ in range(rounds)]
    each = {name: [one[name] for one in taken] for name in taken[0]}
    mean = {name: round(sum(values) / rounds, 4) for name, values in each.items()}
    spread = {name: {"low": min(values), "high": max(values)} for name, values in each.items()}
    return {"name": contestant.name, "precision": contestant.precision, "shares": mean, "spread": spread}


@contextmanager
def replaced(owner, name: str, value):
    """An attribute of a module or a class, other for the time of the context."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def encode_flat(encoder: Encoder, tokens: Tensor, keep: Tensor | None = None, visibility=None) -> Tensor:
    """`Encoder.encode`, the kept tokens picked by their numbers in the whole batch."""
    if keep is not None:
        b, n, d = tokens.shape
        flat = (keep + n * torch.arange(b, device=keep.device)[:, None]).flatten()
        tokens = tokens.flatten(0, 1).index_select(0, flat).view(b, -1, d)
    return ENCODE(encoder, tokens, None, visibility)


def embed_twice(mae: MAE, images: Tensor, choose: Callable) -> Prediction:
    """`MAE.forward`, whoever chooses embeds the images for itself."""
    with torch.no_grad():
        own = mae.encoder.embed(images)
    return FORWARD(mae, images, lambda tokens: choose(own))


def part_after_part(mae: MAE, images: Tensor, choose: Callable) -> Prediction:
    """`MAE.forward`, one pass for each part of a Mask of K·b rows."""
    tokens = mae.encoder.embed(images)
    mask = choose(tokens.detach())
    parts = mask.keep.split(len(tokens))
    said = [mae.decoder(mae.encoder.encode(tokens, keep), keep) for keep in parts]
    return Prediction(torch.cat(said), mask)


def watch_with_autograd(teacher: Teacher, images: Tensor, choose: Callable) -> Prediction:
    """`Teacher.predict`, everything kept that a backward pass would need; none is taken."""
    teacher.requires_grad_(True)
    said = teacher.mae(images, choose)
    teacher.requires_grad_(False)
    return Prediction(said.patches.detach(), said.mask)


ENCODE, FORWARD = Encoder.encode, MAE.forward
always_fused = partial(replaced, clmae.vit, "fused_pays", lambda x: True)
with_flat_gathers = partial(replaced, Encoder, "encode", encode_flat)
with_two_embeddings = partial(replaced, MAE, "forward", embed_twice)
with_single_parts = partial(replaced, MAE, "forward", part_after_part)
with_teacher_graph = partial(replaced, Teacher, "predict", watch_with_autograd)


def within(context: Callable, contestant: Contestant, name: str) -> Contestant:
    """The contestant with its phases inside a context."""

    def wrapped(phase):
        def step(number: int) -> None:
            with context():
                phase(number)

        return step

    phases = {key: wrapped(phase) for key, phase in contestant.phases.items()}
    return Contestant(name, contestant.precision, contestant.parameters, phases, contestant.cycle)


def plain_adamw(case: Case, precision: str) -> Contestant:
    """The textbook's MAE whose optimizer is PyTorch's default."""
    return masked("MAE, textbook", case, precision, "cpu", textbook_mae)


def fused_adamw(case: Case, precision: str) -> Contestant:
    """The textbook's MAE with the fused optimizer."""
    return masked("MAE, textbook, fused AdamW", case, precision, "cpu", textbook_mae, fused=True)


def taken_back(case: Case, params: Config) -> list[Contestant]:
    """Savings one by one: the step with what we do, then without it; flat gathers are what we don't do."""
    known = {"mae": UNIT, "cl_mae": "CL-MAE, ours", "rc_mae": "RC-MAE, ours", "emae": "EMAE, ours"}
    found = []
    for block, context, what in (
        ("mae", with_flat_gathers, "flat gathers"),
        ("cl_mae", with_two_embeddings, "patches embedded twice"),
        ("rc_mae", None, ""),
        ("rc_mae", with_teacher_graph, "teacher with autograd"),
        ("emae", None, ""),
        ("emae", with_single_parts, "part after part"),
    ):
        one = ours(known[block], case, "32", "cpu", params.objectives[block])
        found.append(within(context, one, f"{one.name}, {what}") if context else one)
    return found


def rungs(case: Case, params: Config) -> list[Contestant]:
    """From the textbook down to what params.yaml runs; in float32, then what bfloat16 makes of it."""
    block, released = params.objectives["cl_mae"], params.objectives["cl_mae_released"]
    whole = {**block, "masker": {**block["masker"], "fraction": 1.0}}
    attend = {**released, "relaxation": "attend"}
    found = [plain_adamw(case, "32"), fused_adamw(case, "32"), *textbook_phases(case, "32", "cpu")]
    for name, settings in {
        UNIT: params.objectives["mae"],
        "CL-MAE, ours faithful": released,
        "CL-MAE, ours faithful, attend": attend,
        "CL-MAE, errors replayed, whole batch": whole,
        "CL-MAE, ours": block,
    }.items():
        found.append(ours(name, case, "32", "cpu", settings))
    for precision in ("32", "bf16"):
        name = "MAE, ours, compiled"
        found.append(ours(name, case, precision, "cpu", params.objectives["mae"], compiled=True))
    half = ours(UNIT, case, "bf16", "cpu", params.objectives["mae"])
    again = ours(UNIT, case, "bf16", "cpu", params.objectives["mae"])
    found += [half, within(always_fused, again, "MAE, ours, fused attention")]
    return found + taken_back(case, params)


def operations(contestant: Contestant) -> int:
    """Floating-point operations of a step, counted."""
    with FlopCounterMode(display=False) as counter:
        for phase in contestant.phases.values():
            phase(0)
    return counter.get_total_flops()


def interleaved(found: list[Contestant], rounds: int) -> list[list[float]]:
    """Seconds of a step, for each contestant in every round, after one of warm-up."""
    taken = [[] for _ in found]
    for number in range(-1, rounds):
        for contestant, seconds in zip(found, taken):
            step = sum(sample(contestant, "cpu").values())
            if number >= 0:
                seconds.append(step)
    return taken


def ladder(case: Case, params: Config) -> dict:
    """Everything measured, in multiples of our own MAE's step in float32."""
    found = rungs(case, params)
    unit = next(i for i, c in enumerate(found) if (c.name, c.precision) == (UNIT, "32"))
    counted = [operations(c) for c in found]
    taken = interleaved(found, case.rounds)
    rows = [
        {
            "name": c.name,
            "precision": c.precision,
            "predicted": round(n / counted[unit], 3),
            "measured": summary([t / u for t, u in zip(seconds, taken[unit])], 3),
        }
        for c, n, seconds in zip(found, counted, taken)
    ]
    names = [UNIT, "MAE, ours, fused attention"]
    profiled = [profiles(c, min(case.rounds, 5)) for c in found if c.name in names]
    return {
        "case": case.name,
        "title": case.title,
        "rounds": case.rounds,
        "milliseconds": summary([1000 * seconds for seconds in taken[unit]], 2),
        "profile": profiled,
        "rows": rows,
    }


def table(record: dict) -> str:
    """The ladder for reading."""
    lines = [f"{record['title']} · our MAE in float32 takes {record['milliseconds']['median']:.0f} ms", ""]
    columns = f"{'operations':>12}{'measured':>10}{'from':>10}{'to':>10}"
    lines.append(f"{'a step, in multiples of it':44}{'precision':>10}{columns}")
    for row in record["rows"]:
        values = f"{row['predicted']:12.2f}" + "".join(f"{row['measured'][key]:10.2f}" for key in ORDER)
        lines.append(f"{row['name']:44}{row['precision']:>10}{values}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.ladder", description="What each saving of a step is worth.")
    parser.add_argument("--case", choices=CASES, default="tiny-64", help="the sizes (tiny-64)")
    parser.add_argument("--quick", action="store_true", help="the smallest case, into build/bench")
    parser.add_argument("--rounds", type=int, help="rounds instead of the case's own number")
    given = sys.argv[1:] if given is None else given
    asked, root = parser.parse_args(given), find_root()
    case = CASES["quick" if asked.quick else asked.case]
    case = replace(case, rounds=asked.rounds or case.rounds)
    own = about(root, "bench.ladder", given, "cpu", PACKAGES)
    record = own | ladder(case, read_params(root / "params.yaml"))
    write_json(root / ("build/bench" if asked.quick else "results/bench") / "ladder.json", record)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
