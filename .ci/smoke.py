"""What `make smoke` runs: the whole pipeline, tiny, with DVC, on a copy in build/smoke.

The copy has its own DVC repository, a few of the images and a small model. It shows in a minute and a half
that every stage runs and leaves what it should; its numbers mean nothing.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "build" / "smoke"
DVC = (sys.executable, "-m", "dvc")
TOP = {"clmae", "nbs", "dvc.yaml", "params.yaml", "settings.ini", "setup.py", ".dvcignore"}
ROWS = {"train": 240, "test": 96}
TINY = {
    "runs": ["mae", "cl_mae"],  # one net and two, which is all the pipeline can tell apart
    "model": {
        "width": 48,
        "depth": 2,
        "heads": 3,
        "decoder_width": 48,
        "decoder_depth": 1,
        "decoder_heads": 3,
    },
    "train": {"epochs": 2, "batch_size": 32, "monitor_epochs": 1},
    "film": {"images": 2, "moments": 2, "average_over": 16},
    "evaluate": {"bootstrap": 20, "embedding_images": 60},
}


def copy_sources(top: Path):
    """A fresh folder with what git tracks or would track of the code."""
    shutil.rmtree(top, ignore_errors=True)
    trust = f"safe.directory={ROOT}"  # another user's clone, as in a container
    command = ["git", "-c", trust, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for path in (Path(name) for name in names if name):
        if path.parts[0] in TOP and (ROOT / path).is_file():
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, top / path)


def copy_images(folder: Path):
    """The first rows of the embedded set."""
    folder.mkdir()
    for split, rows in ROWS.items():
        table = pq.read_table(ROOT / "data" / f"{split}.parquet")
        pq.write_table(table.slice(0, rows), folder / f"{split}.parquet")


def override(top: Path, changes: dict):
    """Override sections of params.yaml, or keys of sections, each of which must be there."""
    yaml = YAML()
    params = yaml.load((top / "params.yaml").read_text(encoding="utf-8"))
    for section, given in changes.items():
        place, values = (params[section], given) if isinstance(given, dict) else (params, {section: given})
        for key, value in values.items():
            if key not in place:
                raise SystemExit(f"clmae: params.yaml has no {section}.{key}, which make smoke wants to set")
            place[key] = value
    with (top / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def run(top: Path, *command):
    """Run in a copy, its output shown; end here if it fails."""
    env = os.environ | {"PYTHONPATH": str(top)}
    done = subprocess.run(command, cwd=top, env=env, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"make smoke: {' '.join(command)} failed")


def make_copy(top: Path, changes: dict, images=copy_images):
    """A copy of the repository with changed parameters, a DVC of its own and what `images` puts in data/."""
    copy_sources(top)
    images(top / "data")
    override(top, changes)
    run(top, *DVC, "init", "-q", "--no-scm", "--force")
    run(top, *DVC, "config", "core.analytics", "false")
    run(top, *DVC, "config", "core.check_update", "false")
    run(top, *DVC, "add", "-q", "data")


def main():
    start = time.monotonic()
    make_copy(SMOKE, TINY)
    run(SMOKE, *DVC, "repro")
    figures = sorted((SMOKE / "results" / "figures").glob("*.png"))
    if not (SMOKE / "results" / "metrics.json").exists() or not figures:
        raise SystemExit("make smoke: the pipeline ended without results/metrics.json and figures")
    seconds = time.monotonic() - start
    print(f"Every stage ran, in {seconds:.0f} s in all; {len(figures)} figures in build/smoke/results.")


if __name__ == "__main__":
    main()
