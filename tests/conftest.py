"""What every test shares. Kept small: fixtures for one module live in that module's test file."""

import os

# Before numpy or torch starts: tests run side by side, so each process takes one thread and draws no window.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("clmae", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("clmae")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return Path(__file__).resolve().parent.parent
