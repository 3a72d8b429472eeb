"""A repository in small for tests: prepared images of noise beside their parameters."""

from pathlib import Path

import numpy as np

from clmae import data
from clmae.config import Config, as_yaml


def write_params(folder: Path, config: Config) -> None:
    """Write `config` as params.yaml."""
    sections = config.model_dump(mode="json")
    text = "".join(f"{name}: {as_yaml(section)}\n" for name, section in sections.items())
    (folder / "params.yaml").write_text(text)


def make_repository(folder: Path, config: Config, side: int) -> None:
    """Noise of `side` px in two classes, prepared, and params.yaml."""
    rng, sizes = np.random.default_rng(0), {"train": 64, "val": 32, "test": 32}
    drawn = {name: (rng.integers(0, 255, (n, 3, side, side)), np.arange(n) % 2) for name, n in sizes.items()}
    data.store_arrays(folder / "build/prepared", drawn, ["a", "b"])
    write_params(folder, config)
