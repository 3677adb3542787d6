"""What `gpu.py` asks of a device, each with its stand-in on a CPU."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

Record = Callable[..., None]
"""Writes named findings of a step."""


def properties(device: str) -> dict[str, Any]:
    """Name, memory, compute capability and driver."""
    if device != "cuda":
        return {"gpu": None}
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def has_float8(device: str) -> bool:
    """Whether it multiplies in float8; a CPU emulates it."""
    return device == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError as error:
        return f"unknown: {error}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of a call, the device's work in it included."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def kernel_seconds(call: Callable[[], Any], device: str, small: bool) -> float:
    """Median seconds of a call as the device sees it: launches queue up, so the host's share is not in it."""
    call()
    rounds = 3 if small else 20
    if device != "cuda":
        return statistics.median(seconds(call, device) for _ in range(rounds))
    events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(events))


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None


def limit_memory(device: str, spare_bytes: int | None) -> None:
    """Let this process have so much more device memory than it holds; None: all."""
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1.0 if spare_bytes is None else (torch.cuda.memory_reserved() + spare_bytes) / total
        torch.cuda.set_per_process_memory_fraction(share)


def median_and_spread(values: list[float]) -> dict[str, float]:
    return {"median": short(statistics.median(values)), "min": short(min(values)), "max": short(max(values))}


def short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
