"""What `make record` runs: times of the last runs (build/timings/*.json) and the machine that took them.

They differ from run to run, so no stage writes them and `make verify` does not compare them.
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from clmae.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "timm", "lightning", "numpy", "scikit-learn", "dvc")


def cpu_model() -> str:
    """The processor's name as the system gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    return {"cpu": cpu_model(), "cores": cores(), "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def stages(folder: Path) -> dict:
    """Seconds by stage, as the pipeline left them when each stage last ran."""
    return {path.stem: round(float(read_json(path)["seconds"]), 1) for path in sorted(folder.glob("*.json"))}


def main(root: Path = ROOT) -> int:
    seconds = stages(root / "build" / "timings")
    if not seconds:
        print("clmae: no times in build/timings; run make repro first", file=sys.stderr)
        return 1
    out = root / "results" / "recorded" / "times.json"
    recorded = {"command": "make repro", "machine": machine(), "versions": versions(), "seconds": seconds}
    write_json(out, recorded | {"total": round(sum(seconds.values()), 1)})
    print(f"{out.relative_to(root)}: {len(seconds)} stages, {sum(seconds.values()):.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
