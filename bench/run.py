"""What `make bench` runs: seconds of one training step, ours beside others', in one interleaved run.

    python -m bench.run                    the CPU's cases, all cores: 17 of make bench's 22 minutes on two
    python -m bench.run --case tiny-64     one case
    python -m bench.run --device cuda --precision bf16 --compiled      the GPU's cases, in their precision
    python -m bench.run --quick            tiny, to see that everything runs; its numbers mean nothing

Every round runs every contestant once, beginning with another one each time; a sample is the mean over a
method's cycle of steps, reported is the median over rounds after a warm-up, and of ratios the median of the
rounds' own ratios. Before a case, losses at the same weights are compared and must agree. A matrix product
runs along: the operations a step cannot do without, over its time and the product's rate, are its share of
the peak.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

from clmae.config import UserError, read_params
from clmae.figures import encode
from clmae.files import find_root, read_json, write_bytes, write_json

from .contestants import Case, Contestant, check, contestants
from .figure import draw
from .peak import probe, wait
from .record import about, summary

ROUNDS = 7
CASES = {
    case.name: case
    for case in (
        Case("tiny-64", "tiny", 32, 4, 64, ROUNDS, "ViT-Tiny/4, 32 px, batch 64"),
        Case("tiny-256", "tiny", 32, 4, 256, ROUNDS, "ViT-Tiny/4, 32 px, batch 256"),
        Case("small-16", "small", 224, 16, 16, ROUNDS, "ViT-Small/16, 224 px, batch 16"),
        Case("base-256", "base", 224, 16, 256, 10, "ViT-Base/16, 224 px, batch 256"),
        Case("large-256", "large", 224, 16, 256, 10, "ViT-Large/16, 224 px, batch 256", mae_only=True),
        Case("quick", "micro", 32, 4, 4, 2, "micro/4, 32 px, batch 4", {"width": 32, "depth": 2}),
    )
}
ON = {"cpu": ["tiny-64", "tiny-256", "small-16"], "cuda": ["base-256", "large-256"]}
PRECISIONS = ("32", "bf16")
PACKAGES = "torch timm lightning transformers lightly".split()
MAE, HF, LIGHTLY, PLAIN = "MAE, ours", "MAE, Hugging Face", "MAE, lightly", "MAE, textbook"
HF_COMPILED, COMPILED = f"{HF}, compiled", f"{MAE}, compiled"
TEXT, SHORT = "CL-MAE, textbook", "CL-MAE, textbook without pair loop"
FAITHFUL, DEFAULT = "CL-MAE, ours faithful", "CL-MAE, ours"
# what is divided by what: a contestant, or one of its phases
RATIOS = [
    (HF, MAE), (LIGHTLY, MAE), (PLAIN, MAE), (HF_COMPILED, MAE), (HF, COMPILED), (HF_COMPILED, COMPILED),
    (TEXT, FAITHFUL), (SHORT, FAITHFUL), (FAITHFUL, MAE), (DEFAULT, MAE),
    (f"{TEXT}: A", PLAIN), (f"{TEXT}: B", PLAIN), (f"{SHORT}: B", PLAIN), (TEXT, PLAIN),
]  # fmt: skip
ACROSS = [(HF, MAE), (TEXT, FAITHFUL), (SHORT, FAITHFUL)]  # the left one in float32, the right one in bf16


def clock(device: str) -> float:
    """Seconds, when all work handed out so far is done."""
    wait(device)
    return time.perf_counter()


def sample(contestant: Contestant, device: str) -> dict[str, float]:
    """Seconds of each phase of one step, mean over the contestant's cycle of steps."""
    seconds = dict.fromkeys(contestant.phases, 0.0)
    for step in range(contestant.cycle):
        for name, phase in contestant.phases.items():
            start = clock(device)
            phase(step)
            seconds[name] += (clock(device) - start) / contestant.cycle
    return seconds


def measure(found: list[Contestant], rounds: int, device: str) -> list[list[dict[str, float]]]:
    """For each contestant its sample of every round, after one round of warm-up."""
    samples = [[] for _ in found]
    for number in range(-1, rounds):
        for place in range(len(found)):
            i = (place + number) % len(found)
            taken = sample(found[i], device)
            if number >= 0:
                samples[i].append(taken)
    return samples


def peaks(found: list[Contestant], samples: list) -> dict[str, dict]:
    """Of every probe its operations per second (10¹²) round by round, by precision."""
    known = {}
    for contestant, taken in zip(found, samples):
        each = [contestant.operations / sum(phases.values()) / 1e12 for phases in taken]
        known[contestant.precision] = {"what": contestant.name, "rounds": each}
    return known


def share_of_peak(contestant: Contestant, steps: list[float], peak: dict) -> dict:
    """Operations that a step cannot do without, per second (10¹²), and over those of a matrix product."""
    if not contestant.operations:
        return {}
    rates = [contestant.operations / seconds / 1e12 for seconds in steps]
    shares = [rate / most for rate, most in zip(rates, peak["rounds"])]
    return {"teraflops": summary(rates, 4), "share_of_peak": summary(shares, 3)}


def row(contestant: Contestant, samples: list[dict[str, float]], batch: int, peak: dict) -> dict:
    """A line of the table: milliseconds a step, of each phase too if there are several."""
    steps = [sum(phases.values()) for phases in samples]
    found = {
        "contestant": contestant.name,
        "precision": contestant.precision,
        "parameters": contestant.parameters,
        "images_per_second": summary([batch / seconds for seconds in steps], 1),
        "milliseconds": summary([1000 * s for s in steps], 2),
        "samples": [round(1000 * s, 2) for s in steps],
    }
    if len(contestant.phases) > 1:
        found["phases"] = {p: summary([1000 * s[p] for s in samples], 2) for p in contestant.phases}
    return found | share_of_peak(contestant, steps, peak)


def series(found: list[Contestant], samples: list) -> dict[tuple[str, str], list[float]]:
    """Seconds by round of every (contestant or its phase, precision)."""
    known = {}
    for contestant, taken in zip(found, samples):
        known[contestant.name, contestant.precision] = [sum(phases.values()) for phases in taken]
        for phase in contestant.phases:
            known[f"{contestant.name}: {phase}", contestant.precision] = [phases[phase] for phases in taken]
    return known


def ratios(known: dict[tuple[str, str], list[float]], precisions: tuple[str, ...]) -> list[dict]:
    """How many times as long the first takes as the second, round by round."""
    asked = [(a, p, b, p) for p in precisions for a, b in RATIOS]
    asked += [(a, "32", b, "bf16") for a, b in ACROSS]
    found = []
    for a, p, b, q in asked:
        if (a, p) in known and (b, q) in known:
            each = [x / y for x, y in zip(known[a, p], known[b, q])]
            found.append({"of": a, "of_precision": p, "to": b, "to_precision": q} | summary(each, 3))
    return found


def bench(case: Case, device: str, params, precisions=PRECISIONS, compiled: bool = False, sizes=None) -> dict:
    """Check and measure one case; `sizes` of the matrix product that runs along."""
    agreement = check(case, params)
    found = [c for precision in precisions for c in contestants(case, precision, device, params, compiled)]
    probes = [probe(precision, device, sizes) for precision in precisions]
    samples = measure([*found, *probes], case.rounds, device)
    peak = peaks(probes, samples[len(found) :])
    shape = {"image": case.image, "patch": case.patch, "batch": case.batch, "preset": case.preset}
    return {
        "case": case.name,
        "title": case.title,
        "shape": shape,
        "rounds": case.rounds,
        "agreement": agreement,
        "peak": {p: {"what": one["what"], "teraflops": summary(one["rounds"], 4)} for p, one in peak.items()},
        "rows": [row(c, s, case.batch, peak[c.precision]) for c, s in zip(found, samples)],
        "ratios": ratios(series(found, samples), precisions),
    }


def table(record: dict) -> str:
    """The record for reading."""
    names = {"32": "fp32", "bf16": "bf16"}
    on = record["machine"]
    lines = [f"{record['title']} · {on.get('gpu', on['cpu'])} · threads: {on['threads']}", ""]
    lines.append(
        f"{'':42}{'precision':>9}{'ms/step':>10}{'from':>10}{'to':>10}{'images/s':>10}{'of peak':>10}"
    )
    for one in record["rows"]:
        ms, share = one["milliseconds"], one.get("share_of_peak")
        lines.append(
            f"{one['contestant']:42}{names[one['precision']]:>9}{ms['median']:10.1f}{ms['low']:10.1f}"
            f"{ms['high']:10.1f}{one['images_per_second']['median']:10.0f}"
            + (f"{share['median']:10.0%}" if share else "")
        )
    for precision, peak in record["peak"].items():
        rate = peak["teraflops"]
        lines.append(
            f"peak, {names[precision]}: {peak['what']}, {rate['median']:.3g} TFLOP/s "
            f"({rate['low']:.3g} to {rate['high']:.3g})"
        )
    lines += ["", f"{'times as long':>51}{'median':>10}{'from':>10}{'to':>10}"]
    for one in record["ratios"]:
        what = f"{one['of']} / {one['to']}"
        how = " / ".join(dict.fromkeys(names[one[key]] for key in ("of_precision", "to_precision")))
        lines.append(f"{what:73}{how:>12}{one['median']:8.2f}{one['low']:8.2f}{one['high']:8.2f}")
    worst = max(record["agreement"].values())
    lines += ["", f"losses at the same weights, in float64, differ by at most {worst:.0e} of their value"]
    if None in record["versions"].values():
        absent = ", ".join(name for name, number in record["versions"].items() if number is None)
        lines.append(f"not installed here, so not measured: {absent}")
    return "\n".join(lines)


def draw_records(folder: Path) -> None:
    """The figure of all records in `folder`, as PNG and SVG."""
    records = {path.stem: read_json(path) for path in folder.glob("*.json")}
    figure = draw([records[name] for name in CASES if name in records])
    for kind in ("png", "svg"):
        write_bytes(folder / f"speed.{kind}", encode(figure, kind))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Training steps beside other libraries', timed."
    )
    parser.add_argument("--case", action="append", choices=CASES, help="a case to run; may be repeated")
    parser.add_argument("--device", choices=ON, default="cpu", help="where to run (cpu)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (all cores)")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this one (both)")
    parser.add_argument(
        "--compiled", action="store_true", help="also ours and Hugging Face's by torch.compile"
    )
    parser.add_argument("--rounds", type=int, help="rounds instead of the case's own number")
    parser.add_argument("--out", type=Path, help="folder for JSON and figure (results/bench)")
    parser.add_argument("--quick", action="store_true", help="the smallest case, into build/bench")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    asked = arguments(given)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    root = find_root()
    out = asked.out or root / ("build/bench" if asked.quick else "results/bench")
    precisions = (asked.precision,) if asked.precision else PRECISIONS
    try:
        params = read_params(root / "params.yaml")
        for name in ["quick"] if asked.quick else asked.case or ON[asked.device]:
            case = CASES[name]
            if asked.rounds:
                case = Case(**{**vars(case), "rounds": asked.rounds})
            own = about(root, "bench.run", given, asked.device, PACKAGES)
            sizes = (64, 128) if asked.quick else None
            record = own | bench(case, asked.device, params, precisions, asked.compiled, sizes)
            write_json(out / f"{name}.json", record)
            print(table(record), end="\n\n", flush=True)
        draw_records(out)
    except (UserError, ValueError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
