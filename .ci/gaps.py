"""Record the gap of finished runs: python .ci/gaps.py SET NAME=FOLDER/build/runs/RUN-SEED …

Writes results/recorded/gaps/SET.json with what each run's history says of its masks, its scores and those of
the baselines where they were evaluated, the block of parameters that made it, the machine and the versions.
`nbs/12_health.ipynb` draws the gaps; README tells the scores.
"""

import sys
from pathlib import Path

from record import PACKAGES, ROOT

from clmae.config import read_yaml
from clmae.files import read_json, write_json
from clmae.machine import machine, versions

KEPT = ("epoch", "pos", "factor", "health.gap", "health.verdict", "health.diversity", "health.error", "knn")


def quarters(history: list[dict]) -> dict:
    """Mean gap over the epochs of the first and of the last quarter of training."""
    first = [line["health.gap"] for line in history if line["pos"] <= 0.25]
    last = [line["health.gap"] for line in history if line["pos"] > 0.75]
    return {"first_quarter": sum(first) / len(first), "last_quarter": sum(last) / len(last)}


def scores(path: Path) -> dict:
    """What an evaluation found, if there was one."""
    return read_json(path) if path.exists() else {}


def gap_of(folder: Path) -> dict:
    """What is kept of one finished run, and the parameters beside which it lies."""
    history, record = read_json(folder / "history.json"), read_json(folder / "run.json")
    params = read_yaml(folder.parents[2] / "params.yaml")
    sections = {name: params[name] for name in ("data", "model", "train")}
    lines = [{key: line[key] for key in KEPT if key in line} for line in history]
    return {
        **quarters(history),
        "seed": record["seed"],
        "steps": record["step"],
        "flops": record["flops"],
        "block": params["objectives"][record["run"]],
        "params": sections,
        "scores": scores(folder.parents[2] / "results/evaluate" / f"{folder.name}.json"),
        "command": f"python -m clmae pretrain --run {record['run']} --seed {record['seed']}",
        "history": lines,
    }


def main(name: str, *runs: str) -> int:
    folders = {label: Path(folder) for label, folder in (run.split("=", 1) for run in runs)}
    found = {label: gap_of(folder) for label, folder in folders.items()}
    places = [folder.parents[2] / "results/evaluate/baselines.json" for folder in folders.values()]
    baselines = next(filter(None, map(scores, places)), {})
    out = ROOT / "results" / "recorded" / "gaps" / f"{name}.json"
    how = {"machine": machine(), "versions": versions(*PACKAGES)}
    write_json(out, {**how, "baselines": baselines, "runs": found})
    for label, run in found.items():
        verdicts = sorted({line["health.verdict"] for line in run["history"]})
        first, last = run["first_quarter"], run["last_quarter"]
        print(f"{label}: first quarter {first:.3f}, last {last:.3f}; {', '.join(verdicts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
