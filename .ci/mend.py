"""What `make repro` does first: put away what a killed DVC left half written.

DVC notes who reads and writes what in .dvc/tmp/rwlock, in place. Killed in the middle, it leaves a piece
that is no JSON, and refuses ever after to start.
"""

import json
import sys
import time
from pathlib import Path


def broken(path: Path) -> bool:
    """Whether there is a file that is no JSON."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def mend(root: Path, pause: float = 1.0) -> bool:
    """Remove a broken note; whether there was one. One that is only just being written is left alone."""
    path = root / ".dvc/tmp/rwlock"
    if not broken(path):
        return False
    time.sleep(pause)
    if not broken(path):
        return False
    path.unlink(missing_ok=True)
    print(f"clmae: removed {path.relative_to(root)}, which a killed DVC left half written", file=sys.stderr)
    return True


if __name__ == "__main__":
    mend(Path(__file__).resolve().parent.parent)
