"""What `make smoke` runs: the whole pipeline, tiny, with DVC, on a copy in build/smoke.

The copy has its own DVC repository, a few of the images and a small model. It shows in about a minute that
every stage runs and leaves what it should; its numbers mean nothing.
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
TOP = {"clmae", "nbs", "dvc.yaml", "params.yaml", "settings.ini", "setup.py", ".dvcignore"}
ROWS = {"train": 240, "test": 96}
TINY = {
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


def copy_sources():
    """A fresh build/smoke with what git tracks or would track of the code."""
    shutil.rmtree(SMOKE, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for path in (Path(name) for name in names if name):
        if path.parts[0] in TOP and (ROOT / path).is_file():
            (SMOKE / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, SMOKE / path)


def copy_images():
    """The first rows of the embedded set."""
    (SMOKE / "data").mkdir()
    for split, rows in ROWS.items():
        pq.write_table(
            pq.read_table(ROOT / "data" / f"{split}.parquet").slice(0, rows), SMOKE / f"data/{split}.parquet"
        )


def shrink(params: dict):
    """Override the keys of TINY, each of which must be there."""
    for section, keys in TINY.items():
        for key, value in keys.items():
            if key not in params[section]:
                raise SystemExit(f"clmae: params.yaml has no {section}.{key}, which make smoke wants to set")
            params[section][key] = value


def run(*command):
    """Run in build/smoke, its output shown; end here if it fails."""
    env = os.environ | {"PYTHONPATH": str(SMOKE)}
    done = subprocess.run(command, cwd=SMOKE, env=env, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"make smoke: {' '.join(command)} failed")


def main():
    start = time.monotonic()
    copy_sources()
    copy_images()
    yaml = YAML()
    params = yaml.load((SMOKE / "params.yaml").read_text(encoding="utf-8"))
    shrink(params)
    with (SMOKE / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    dvc = (sys.executable, "-m", "dvc")
    run(*dvc, "init", "-q", "--no-scm", "--force")
    run(*dvc, "config", "core.analytics", "false")
    run(*dvc, "config", "core.check_update", "false")
    run(*dvc, "add", "-q", "data")
    run(*dvc, "repro")
    figures = sorted((SMOKE / "results" / "figures").glob("*.png"))
    if not (SMOKE / "results" / "metrics.json").exists() or not figures:
        raise SystemExit("make smoke: the pipeline ended without results/metrics.json and figures")
    seconds = time.monotonic() - start
    print(f"Every stage ran, in {seconds:.0f} s in all; {len(figures)} figures in build/smoke/results.")


if __name__ == "__main__":
    main()
