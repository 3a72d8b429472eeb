"""What matrix products reach here: the peak that a training step is compared with.

A square product per precision, measured beside the contestants in every round of `bench.run`. Its size is the
fastest of a few, so that the peak is that of the device and not of a shape.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .contestants import Contestant

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}
TYPES = {"32": torch.float32, "bf16": torch.bfloat16}
NAME = "matrix product"


def wait(device: str) -> None:
    """Until all work handed out so far is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def operands(size: int, precision: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices (size, size) and room for their product."""
    return tuple(torch.randn(size, size, device=device).to(TYPES[precision]) for _ in range(3))


def product(size: int, precision: str, device: str, count: int) -> Callable[[int], None]:
    """A phase: `count` products of square matrices."""
    a, b, room = operands(size, precision, device)

    def step(number: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=room)

    return step


def rate(step: Callable[[int], None], device: str) -> float:
    """Calls per second, the faster of two after one that warms up."""
    seconds = []
    for number in range(3):
        wait(device)
        start = time.perf_counter()
        step(number)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 1 / min(seconds[1:])


def fastest(precision: str, device: str, sizes: tuple[int, ...] | None = None) -> int:
    """The size of the products with most operations per second."""
    sizes = sizes or SIZES[device]
    return max(sizes, key=lambda n: n**3 * rate(product(n, precision, device, 2), device))


def probe(precision: str, device: str, sizes: tuple[int, ...] | None = None, count: int = 4) -> Contestant:
    """`count` products as a contestant; its operations are 2·n³ each."""
    size = fastest(precision, device, sizes)
    phases = {"step": product(size, precision, device, count)}
    return Contestant(f"{NAME} of {size} × {size}", precision, 0, phases, operations=2 * count * size**3)
