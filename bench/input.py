"""Images per second of each way to read images, beside the training that is to be fed; `make bench` runs it.

    python -m bench.input                  on the CPU, some minutes
    python -m bench.input --device cuda    on the GPU
    python -m bench.input --quick          tiny, to see that everything runs; its numbers mean nothing

The images are JPEGs of smooth noise with the spectrum of photographs, made on the fly in a temporary folder.
A loader runs alone, with all cores: augmented batches on the device, as fast as they come. Where training and
loading share the cores (no GPU), `share` says how much of a step's time the loader takes from it.
"""

import argparse
import logging
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from clmae.config import UserError
from clmae.data import Store, TrainBatches, cores, prepare
from clmae.files import find_root, write_json
from clmae.shards import open_shards, shard

from .contestants import Case, ours
from .record import about, summary
from .run import clock

SPECTRUM = 1.0  # the amplitude falls as 1/f, as in photographs
QUALITY = 90


@dataclass(frozen=True)
class Input:
    """What is read: files of (height, width) px, how many, in which batches; and the training to be fed."""

    files: tuple[int, int]
    count: int
    batch: int
    steps: int
    rounds: int
    training: Case

    @property
    def size(self) -> tuple[int, int]:
        return (self.training.image, self.training.image)


TINY = Case("tiny", "tiny", 32, 4, 64, 7, "ViT-Tiny/4, 32 px")
SMALL = Case("small", "small", 224, 16, 16, 7, "ViT-Small/16, 224 px")
INPUTS = [Input((32, 32), 4096, 256, 8, 7, TINY), Input((375, 500), 512, 64, 4, 7, SMALL)]
QUICK = Input((40, 48), 48, 8, 2, 1, Case("quick", "micro", 32, 8, 4, 1, "micro/8, 32 px", {"depth": 1}))
GPU_BATCH = {"tiny": 1024, "small": 256}


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise (h, w, 3) uint8 whose amplitude falls with frequency as a photograph's; mostly gray."""
    h, w = size
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    f[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((4, h, w))) / f**SPECTRUM
    planes = np.fft.irfft2(noise, (h, w))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    image = 120 + 45 * planes[0] + 15 * planes[1:]
    return image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def write_photographs(folder: Path, asked: Input, kinds: int = 32) -> int:
    """Fill a folder with JPEGs, some pictures rolled by random offsets; their mean size in bytes."""
    rng, sizes = np.random.default_rng(0), []
    pictures = [photograph(rng, asked.files) for _ in range(min(kinds, asked.count))]
    folder.mkdir()
    for i in range(asked.count):
        path, offsets = folder / f"{i:06d}.jpg", rng.integers(0, asked.files)
        image = np.roll(pictures[i % len(pictures)], offsets, axis=(0, 1))
        Image.fromarray(image).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return round(sum(sizes) / len(sizes))


def worker_counts(most: int) -> list[int]:
    """1, 2, 4 … and all cores."""
    return sorted({*(2**k for k in range(most.bit_length())), most})


def loaders(asked: Input, folder: Path, device: str) -> list[tuple[str, int | None, object]]:
    """(path, decoding threads, batches) of every way to read the images below `folder`/photographs."""
    how = {"image_size": asked.size, "validation": 0.02}
    prepare(folder / "photographs", folder / "prepared", **how)
    shard(folder / "photographs", folder / "shards", per_shard=max(asked.count // 8, 1), **how)
    store, same = Store.open(folder / "prepared", "train"), {"seed": 0, "device": device}
    same["batch_size"] = min(asked.batch, len(store))
    found = [
        ("device-resident", None, TrainBatches(store, resident="always", **same)),
        ("memory map", None, TrainBatches(store, resident="never", **same)),
    ]
    for workers in worker_counts(cores()):
        shards = {"urls": str(folder / "shards/train-*.tar"), "workers": workers, "buffer": asked.count // 4}
        found.append(("shards", workers, open_shards(image_size=asked.size, **shards, **same)))
    return found


def settle(batches) -> None:
    """Wait until nothing is being prepared any more."""
    for pending in getattr(batches.reader, "ahead", {}).values():
        for each in pending if isinstance(pending, list) else [pending]:
            each.result()


def rates(found: list, asked: Input, device: str) -> list[list[float]]:
    """Images per second of each loader in each round, interleaved, after a round of warm-up."""
    measured, begun = [[] for _ in found], 0
    for number in range(-1, asked.rounds):
        for place in range(len(found)):
            i = (place + number) % len(found)
            batches = found[i][2]
            batches.batch(begun)  # uses up what was prepared while others were measured
            start = clock(device)
            for step in range(begun + 1, begun + 1 + asked.steps):
                batches.batch(step)
            seconds = clock(device) - start
            settle(batches)
            if number >= 0:
                measured[i].append(asked.steps * batches.batch_size / seconds)
        begun += 1 + asked.steps
    return measured


def training_rate(case: Case, device: str, precision: str) -> list[float]:
    """Images per second of MAE's training step, on images that are there already, round by round."""
    step = ours("MAE", case, precision, device, {"objective": "mae"}).phases["step"]
    seconds = []
    for number in range(-2, case.rounds):
        start = clock(device)
        step(number + 2)
        seconds.append(clock(device) - start)
    return [case.batch / each for each in seconds[2:]]


def spread(reading: list[float], training: list[float]) -> dict[str, float]:
    """The least and the most that reading, in a round of its own, may be of training."""
    low, high = min(reading) / max(training), max(reading) / min(training)
    return {"low": round(low, 3), "high": round(high, 3)}


def measure(asked: Input, device: str, precision: str) -> dict:
    """All paths of one size, and the training beside them."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_photographs(Path(folder) / "photographs", asked)
        found = loaders(asked, Path(folder), device)
        measured, names = rates(found, asked, device), [each[:2] for each in found]
        del found  # ends the threads that read
    train = training_rate(asked.training, device, precision)
    rows = []
    for (path, workers), each in zip(names, measured, strict=True):
        times = median(each) / median(train)
        rows.append(
            {"path": path, "workers": workers, "images_per_second": summary(each, 1)}
            | {"times_training": round(times, 3), "times_training_spread": spread(each, train)}
            | {"share": round(1 / times, 4), "bottleneck": times < 1}
        )
    case = {"preset": asked.training.preset, "patch": asked.training.patch, "batch": asked.training.batch}
    return {
        "title": asked.training.title,
        "files": {"format": "JPEG", "quality": QUALITY, "height": asked.files[0], "width": asked.files[1]}
        | {"bytes": size, "count": asked.count},
        "image": asked.training.image,
        "rounds": asked.rounds,
        "batch": asked.batch,
        "training": case | {"precision": precision, "images_per_second": summary(train, 1)},
        "paths": rows,
    }


def table(record: dict) -> str:
    """The record for reading; the last column says what limits."""
    on, lines = record["machine"], []
    for size in record["sizes"]:
        files, train = size["files"], size["training"]
        kind = f"JPEGs of {files['height']} × {files['width']} px, {files['bytes'] / 1000:.1f} kB"
        rate = train["images_per_second"]["median"]
        lines += [f"{size['title']} · {kind} · {on.get('gpu', on['cpu'])}, {on['cores']} cores"]
        lines += [f"{'':34}{'images/s':>10}{'from':>10}{'to':>10}{'× training':>12}"]
        lines += [f"{'training to be fed (MAE, ' + train['precision'] + ')':34}{rate:10.0f}"]
        for row in size["paths"]:
            threads = f", {row['workers']} threads" if row["workers"] else ""
            a, b, c = (row["images_per_second"][key] for key in ("median", "low", "high"))
            limits = "  BOTTLENECK" if row["bottleneck"] else ""
            lines += [
                f"{row['path'] + threads:34}{a:10.0f}{b:10.0f}{c:10.0f}{row['times_training']:12.2f}{limits}"
            ]
        if record["device"] == "cpu":
            lines += [f"{'':4}on shared cores, reading takes 1/(× training) of the time of a step besides"]
        lines += [""]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.input", description="Images per second of each way to read.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (cpu)")
    parser.add_argument("--precision", choices=["32", "bf16"], help="of the training (32; on a GPU bf16)")
    parser.add_argument("--out", type=Path, help="folder for input.json (results/bench)")
    parser.add_argument("--quick", action="store_true", help="the smallest case, into build/bench")
    given = sys.argv[1:] if given is None else given
    asked = parser.parse_args(given)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    device, precision = asked.device, asked.precision or ("bf16" if asked.device == "cuda" else "32")
    sizes = [QUICK] if asked.quick else INPUTS
    if device == "cuda" and not asked.quick:
        sizes = [replace(s, training=replace(s.training, batch=GPU_BATCH[s.training.name])) for s in sizes]
    root, packages = find_root(), ["torch", "pillow", "webdataset", "timm"]
    record = about(root, "bench.input", given, device, packages) | {"sizes": []}
    try:
        record["sizes"] += [measure(size, device, precision) for size in sizes]
    except UserError as error:
        print(f"bench.input: error: {error}", file=sys.stderr)
        return 2
    out = asked.out or root / ("build/bench" if asked.quick else "results/bench")
    write_json(out / "input.json", record)
    print(table(record))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(cores())
    sys.exit(main())
