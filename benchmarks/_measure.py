"""Time, memory, bandwidth and the machine: what every benchmark reads off, on a CPU or a GPU.

On a CPU a sample is wall-clock time; short calls are repeated in it. On a GPU it is the device's time between two CUDA
events, for each call on its own and after a buffer larger than the L2 cache was written, so that inputs come from
memory; writing it also covers the host's launch of an ordinary call. What the host needed to issue the call is
measured apart.

Left out: clock control, energy, and on a CPU the flushing of caches: a working set that fits is found there.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch

from arpo_ext import ops

_SAMPLE_S = 2e-3  # shorter calls are repeated until a sample takes this long
_PROBE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_SMOKE_BYTES = 16 << 20


class Sample(NamedTuple):
    """seconds: of one call. host_s: what the host needed to issue it, None on a CPU, where that is the call itself."""

    seconds: float
    host_s: float | None


class Meter:
    """Times calls on one device and measures that device's bandwidth.

    probes: name -> a call that moves `probe_bytes[name]`: "read" sums a large tensor, "copy" copies it into another.
    """

    def __init__(self, device: str, smoke: bool = False) -> None:
        self.device = device
        self.on_gpu = device.startswith("cuda")
        size = _SMOKE_BYTES if smoke else _PROBE_BYTES["cuda" if self.on_gpu else "cpu"]
        # Sums of int64 are torch's fastest pass on a CPU that only reads; on a GPU those of float32.
        kind = torch.float32 if self.on_gpu else torch.int64
        data = torch.ones(size // kind.itemsize, dtype=kind, device=device)
        target = torch.empty_like(data)
        self.probes: dict[str, Callable[[], Any]] = {"read": data.sum, "copy": lambda: target.copy_(data)}
        self.probe_bytes = {"read": size, "copy": 2 * size}
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device=device)

    def repeats(self, seconds: float) -> int:
        """How many calls of that length make up a sample."""
        return max(1, min(20 if self.on_gpu else 10_000, int(_SAMPLE_S / max(seconds, 1e-7))))

    def sample(self, call: Callable[[], Any], repeats: int = 1) -> Sample:
        """Mean over `repeats` calls."""
        if self.on_gpu:
            return self._device_sample(call, repeats)
        if repeats > 1:
            call()  # a short call finds its data in the cache whoever ran before
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return Sample((time.perf_counter() - start) / repeats, None)

    def _device_sample(self, call: Callable[[], Any], repeats: int) -> Sample:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        host_s = 0.0
        with torch.cuda.device(self.device):
            for start, end in events:
                self._flush.zero_()
                start.record()
                issued = time.perf_counter()
                call()
                host_s += time.perf_counter() - issued
                end.record()
            torch.cuda.synchronize()
        return Sample(sum(start.elapsed_time(end) for start, end in events) / 1e3 / repeats, host_s / repeats)

    def peak_mb(self, call: Callable[[], Any]) -> tuple[Any, float | None]:
        """What the call returned, and the MiB it needed above what was there, its results included; None if unknown."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = call()
            return result, (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        try:
            # Freed memory that the allocator kept would serve the call unseen.
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
            ops.empty_cache()
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # the high-water mark restarts at the present size
            before = _status_kb("VmRSS")
        except OSError:
            return call(), None
        result = call()
        return result, max(0, _status_kb("VmHWM") - before) / 1024


def _status_kb(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest samples."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def machine(device: str, threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """The date, the processor, the GPU if that is what is measured, and the versions of `packages` that are there."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in packages:
        try:
            record[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return record | _gpu(device) if device.startswith("cuda") else record


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpu(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    record = {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "l2_mb": properties.L2_cache_size >> 20,
        "cuda": torch.version.cuda,
    }
    # The datasheet's bandwidth: two transfers a clock (in kHz) over a bus of so many bits.
    clock, bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if clock and bits:
        record["datasheet_gbs"] = round(2 * clock * bits / 8 / 1e6)
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return record
    # One line a GPU in the driver's order, which CUDA_VISIBLE_DEVICES may have cut: then these are the first's.
    values = answer.splitlines()[0].split(", ") if answer else []
    return record | {name.replace("clocks.", "clock_").replace(".", "_"): v for name, v in zip(fields, values)}  # noqa: B905
