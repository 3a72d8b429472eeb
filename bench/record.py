"""What every record of the benchmark says of itself: the command, the code, the machine, the versions."""

import shlex
import subprocess
from pathlib import Path
from statistics import median

from clmae.bakeoff import commit
from clmae.machine import machine, versions


def summary(values: list[float], digits: int) -> dict[str, float]:
    """Median, lowest and highest, rounded."""
    numbers = {"median": median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) for name, value in numbers.items()}


def commit_of(root: Path) -> str:
    """The checked-out commit, with a `+` if the library, the parameters or the benchmark differ from it."""
    state = commit(root)
    done = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "--", "bench"], capture_output=True, text=True
    )
    return state if state.endswith("+") else state + "+" * bool(done.stdout.strip())


def about(root: Path, module: str, given: list[str], device: str, packages: list[str]) -> dict:
    """The part that all records have: `given` are the words after `python -m MODULE`."""
    return {
        "command": shlex.join(["python", "-m", module, *given]),
        "commit": commit_of(root),
        "device": device,
        "machine": machine(device),
        "versions": versions(*packages),
    }
