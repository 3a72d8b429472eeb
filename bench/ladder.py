"""Where the time of a step goes, and what each saving is worth: python -m bench.ladder

Writes results/bench/ladder.json: the profile of our MAE's step by kind of operation, and the ladder from the
textbook's CL-MAE down to ours, each rung predicted by its operations, all measured in one run.
`nbs/21_speed.ipynb` draws both.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median

from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import clmae.vit
from clmae.config import Config, read_params
from clmae.files import find_root, write_json
from clmae.machine import machine, versions

from .contestants import Case, Contestant, masked, ours, textbook_mae, textbook_phases
from .run import CASES, PACKAGES, sample, summary

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::convolution_backward", "aten::mkldnn_convolution"),
    "attention": ("scaled_dot_product", "aten::bmm", "softmax"),
    "activation and norm": ("gelu", "layer_norm"),
    "optimizer": ("adamw", "AdamW", "zero_grad"),
    "copies and gathers": ("copy_", "cat", "gather", "scatter", "index", "clone", "fill_", "zero_", "repeat"),
}
UNIT = "MAE, ours"


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


@contextmanager
def always_fused():
    """Our blocks with the fused attention kernel whatever the precision."""
    kept, clmae.vit.fused_pays = clmae.vit.fused_pays, lambda x: True
    try:
        yield
    finally:
        clmae.vit.fused_pays = kept


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
    return [*found, half, within(always_fused, again, "MAE, ours, fused attention")]


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
    profiled = [c for c in found if c.name.startswith(UNIT) and "compiled" not in c.name]
    return {
        "case": case.name,
        "title": case.title,
        "command": f"python -m bench.ladder --case {case.name}",
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "milliseconds": round(1000 * median(taken[unit]), 2),
        "profile": [{"name": c.name, "precision": c.precision, "shares": shares(c)} for c in profiled],
        "rows": rows,
    }


def table(record: dict) -> str:
    """The ladder for reading."""
    lines = [f"{record['title']} · our MAE in float32 takes {record['milliseconds']:.0f} ms", ""]
    lines.append(f"{'a step, in multiples of it':44}{'precision':>10}{'operations':>12}{'measured':>10}")
    for row in record["rows"]:
        values = f"{row['predicted']:12.2f}{row['measured']['median']:10.2f}"
        lines.append(f"{row['name']:44}{row['precision']:>10}{values}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.ladder", description="What each saving of a step is worth.")
    parser.add_argument("--case", choices=CASES, default="tiny-64", help="the sizes (tiny-64)")
    parser.add_argument("--quick", action="store_true", help="the smallest case, into build/bench")
    asked, root = parser.parse_args(given), find_root()
    case = CASES["quick" if asked.quick else asked.case]
    record = ladder(case, read_params(root / "params.yaml"))
    write_json(root / ("build/bench" if asked.quick else "results/bench") / "ladder.json", record)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
