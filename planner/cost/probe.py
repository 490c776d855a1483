"""What a probe of a second or so finds out of a device: how fast it multiplies, copies, and starts an op."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from .watch import Watch

if TYPE_CHECKING:
    import torch

TYPES = ("float32", "float64", "bfloat16", "float16")
PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices that the probe multiplies
COPY = {"cpu": 64 << 20, "cuda": 512 << 20}  # bytes that it copies: more than any cache holds
PROBE_TIME = 0.15  # seconds for each rate
MOST_RUNS = 20  # for each rate
PATIENCE = 4  # times as many, and as many seconds, where other work gets in the way
# What a CPU reaches at least in products, by the instructions that torch finds: operations a second of one thread. And bytes a
# second, and seconds of a small op. They stand in for a probe that other work has spoilt, where they are better.
SURE_FLOPS = {"AVX512": 4e10, "AVX2": 2e10}
SURE_FLOPS_ELSE, SURE_BANDWIDTH, SURE_LAUNCH = 5e9, 5e9, 5e-6


class Rates(msgspec.Struct, frozen=True):
    """What a probe measured: operations per second by element type, bytes per second, seconds.

    Attributes:
        link: bytes per second to the host.
        back: bytes per second from there.
        duplex: the share of either that is left while copies go both ways.
    """

    flops: dict[str, float]
    bandwidth: float
    launch: float
    link: float = 0.0
    back: float = 0.0
    duplex: float = 1.0

    @property
    def sound(self) -> bool:
        """Whether a plan can rest on the figures."""
        known = min(self.bandwidth, self.launch, self.flops.get("default", 0.0), *self.flops.values()) > 0
        return known and (self.link > 0) == (self.back > 0)  # a file of before both ways were measured has one

    def better(self, other: "Rates") -> "Rates":
        """The better of each figure: what disturbs a probe only makes it worse."""
        names = self.flops.keys() | other.flops.keys()
        return Rates(
            {name: max(self.flops.get(name, 0.0), other.flops.get(name, 0.0)) for name in sorted(names)},
            max(self.bandwidth, other.bandwidth),
            min(self.launch, other.launch),
            max(self.link, other.link),
            max(self.back, other.back),
            max(self.duplex, other.duplex) if min(self.link, other.link) > 0 else self.duplex,
        )


def with_sure(rates: Rates, device: str) -> Rates:
    """Rates of a probe that other work has got in the way of, no worse than any such CPU's."""
    if device != "cpu":
        return rates
    import torch

    each = SURE_FLOPS.get(torch.backends.cpu.get_cpu_capability(), SURE_FLOPS_ELSE) * torch.get_num_threads()
    sure = Rates({name: each for name in ("float32", "default")}, SURE_BANDWIDTH, SURE_LAUNCH)
    return rates.better(sure)


def probe(device: str) -> Rates:
    """Measure the device: a matrix product for each type, a copy, an op too small to count, copies to the host and back."""
    import torch

    small = torch.zeros(1, device=device)
    flops = {}
    for name in TYPES:
        with suppress(RuntimeError):  # a type that the device does not multiply
            flops[name] = product_rate(device, name)
    flops["default"] = flops["float32"]
    source = torch.ones(COPY[device], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copied = best_time(device, lambda: target.copy_(source))
    launch = best_time(device, lambda: [small.add(1.0) for _ in range(100)]) / 100
    host = link_rates(source, target) if device == "cuda" else ()
    return Rates(flops, 2 * source.numel() / copied, launch, *host)


def link_rates(source: "torch.Tensor", target: "torch.Tensor") -> tuple[float, float, float]:
    """Bytes per second from the GPU to pinned memory and back, and the share of the slower that both at once leave."""
    import torch

    pinned = [torch.empty(source.numel(), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def out() -> None:
        with torch.cuda.stream(streams[0]):
            pinned[0].copy_(source, non_blocking=True)

    def back() -> None:
        with torch.cuda.stream(streams[1]):
            target.copy_(pinned[1], non_blocking=True)

    leaving, coming = best_time("cuda", out), best_time("cuda", back)
    both = best_time("cuda", lambda: (out(), back()))
    return source.numel() / leaving, source.numel() / coming, min(1.0, max(leaving, coming) / both)


def product_rate(device: str, dtype: str) -> float:
    """Operations per second in a product of square matrices; smaller ones where the type is slow."""
    import torch

    rows = PRODUCT[device] // 4
    while True:
        matrix = torch.ones(rows, rows, dtype=getattr(torch, dtype), device=device)
        seconds = best_time(device, lambda matrix=matrix: matrix @ matrix)
        if rows >= PRODUCT[device] or 8 * seconds > PROBE_TIME:
            return 2 * rows**3 / seconds
        rows *= 2


def best_time(device: str, action: Callable[[], object]) -> float:
    """The least but one of several times: what disturbs a run can only lengthen it, and one that cannot be has no say.

    Of runs that did not wait for a core, where there are any; for them it takes up to four times as long.
    """
    import torch

    good: list[float] = []
    bad: list[float] = []
    start = time.perf_counter()
    while len(good) < MOST_RUNS and len(bad) < PATIENCE * MOST_RUNS:
        with Watch() as watch:
            begin = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            end = time.perf_counter()
        (bad if watch.disturbed else good).append(end - begin)
        if end - start > (PROBE_TIME if len(good) > 2 else PATIENCE * PROBE_TIME):
            break
    times = sorted(good or bad)
    return times[min(1, len(times) - 1)]
