"""What every test shares. Kept small: fixtures for one module live in that module's test file."""

import importlib.util
import os
import sys
import tempfile

# Before numpy or torch starts: tests run side by side, so each process takes one thread and draws no window.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Whose shell, git, DVC and matplotlib these are decides no test.
os.environ["SHELL"] = "/bin/sh"
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
for name in (
    "DIR",
    "WORK_TREE",
    "INDEX_FILE",
    "PREFIX",
    "COMMON_DIR",
    "OBJECT_DIRECTORY",
):  # as hooks set them
    os.environ.pop(f"GIT_{name}", None)
count = int(os.environ.get("GIT_CONFIG_COUNT", 0))
for i, (key, value) in enumerate({"commit.gpgsign": "false", "core.hooksPath": os.devnull}.items(), count):
    os.environ |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value, "GIT_CONFIG_COUNT": f"{i + 1}"}
place = tempfile.TemporaryDirectory(prefix="clmae-tests-")
for name in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG"):
    os.environ[f"DVC_{name}_DIR"] = f"{place.name}/{name}"
os.environ |= {"DVC_NO_ANALYTICS": "1", "LOGNAME": os.environ.get("LOGNAME", "nobody")}
[folder] = importlib.util.find_spec("matplotlib").submodule_search_locations
os.environ["MATPLOTLIBRC"] = f"{folder}/mpl-data/matplotlibrc"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("clmae", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("clmae")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return Path(__file__).resolve().parent.parent
