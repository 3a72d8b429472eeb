"""What `make record` runs: times of the last runs (build/timings/*.json), the machine that took them, README.

They differ from run to run, so no stage writes them and `make verify` does not compare them.
README's tables are outputs of nbs/index.ipynb: it is executed anew, and README written from it.
"""

import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from clmae.config import UserError
from clmae.files import read_json, write_bytes, write_json
from clmae.machine import machine, versions
from clmae.pipeline import write_readme

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "torch timm lightning numpy scikit-learn dvc".split()


def times(folder: Path) -> dict:
    """Seconds of each stage of the pipeline, and of each pretraining run within its stage."""
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    runs = {name for name, record in found.items() if "steps" in record}
    seconds = {name: round(record["seconds"], 1) for name, record in found.items()}
    stages = {name: value for name, value in seconds.items() if name not in runs}
    return {"stages": stages, "pretraining": {name: seconds[name] for name in sorted(runs)}}


def record(root: Path) -> Path:
    """Write results/recorded/times.json; UserError if nothing was timed."""
    found = times(root / "build" / "timings")
    if not found["stages"]:
        raise UserError("no times in build/timings; run make repro first")
    total = round(sum(found["stages"].values()), 1)
    out = root / "results" / "recorded" / "times.json"
    how = {"command": "make repro", "machine": machine(), "versions": versions(*PACKAGES)}
    write_json(out, {**how, "total": total, **found})
    return out


def execute(path: Path):
    """Run a notebook from top to bottom and keep its outputs."""
    notebook = nbformat.read(path, 4)
    quiet = ["--IPKernelApp.log_level=ERROR"]
    NotebookClient(
        notebook,
        extra_arguments=quiet,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    write_bytes(path, (nbformat.writes(notebook) + "\n").encode())
    subprocess.run(["nbdev_clean", "--fname", str(path)], cwd=path.parent, check=True)


def main() -> int:
    try:
        print(record(ROOT).relative_to(ROOT))
    except UserError as error:
        print(f"clmae: error: {error}", file=sys.stderr)
        return 1
    execute(ROOT / "nbs" / "index.ipynb")
    write_readme(ROOT)
    print("README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
