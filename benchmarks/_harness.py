"""How every benchmark measures, checks and prints.

A benchmark module `bench_<op>.py` defines

    def cases(options: Options) -> Iterator[Case]      # yield one at a time, so that its tensors can be freed
    def main(argv=None) -> int: return _harness.main(argv, ("<op>",))
    if __name__ == "__main__": raise SystemExit(main())

and `BENCHES` in `__init__.py` lists `<op>`. A `Case` is one op at one shape with all its providers; the first provider
is ours and the others are compared with it. `options.smoke` asks for small shapes and few providers: a smoke run of one
op should take seconds, because the tests run it.

The protocol, the same for all: each provider is set up untimed (compile, allocate, warm up) and its result is checked
against the case's reference; a wrong result ends the run with exit code 1. Then rounds, in rotating order: each round
times every provider once, and the machine's read bandwidth once, so that a disturbance hits all alike. Short calls are
repeated within a sample. Reported are the 20th, 50th and 80th percentile; GB/s are the counted bytes (what the op must
move, not what a provider happens to move) over the median. A provider that cannot run is listed with its reason.

Left out: clock control, cache flushing (say so where the data fits a cache), energy.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from arpo_ext.ops import BackendError

_SAMPLE_S = 2e-3  # shorter calls are repeated until a sample takes this long
_READ_BYTES = 256 << 20


class Unavailable(Exception):
    """Raised by `Provider.make` where the provider cannot run; the text is printed."""


class WrongResult(Exception):
    """A provider's result is further from the reference than it may be."""


@dataclass(frozen=True)
class Options:
    smoke: bool = False
    rounds: int = 11
    threads: int = 0
    device: str = "cpu"
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provider:
    """make() prepares, and returns the call to time. tolerance: largest error allowed; None takes the case's."""

    name: str
    make: Callable[[], Callable[[], Any]]
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """columns: what identifies the case, such as {"op", "pass", "N", "V", "dtype"}. counted_bytes: see the module.
    error(result): largest absolute difference between a provider's result and the reference; NaN counts as wrong."""

    columns: Mapping[str, str | int]
    counted_bytes: int
    providers: Sequence[Provider]
    error: Callable[[Any], float]
    tolerance: float


@dataclass
class _Running:
    name: str
    call: Callable[[], Any]
    repeats: int = 1
    error: float | None = None
    peak_mb: float | None = None
    samples_s: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None, ops: Sequence[str]) -> int:
    """Run the benchmarks of `ops`, or those of them that `argv` names, and print or write the rows."""
    parser = argparse.ArgumentParser(prog="arpo-ext bench", description="Time ops against peers and the memory limit.")
    parser.add_argument("ops", nargs="*", help=f"which of: {', '.join(ops)} (default: all)")
    parser.add_argument("--smoke", action="store_true", help="small shapes: does everything still run")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 11; smoke 3)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", default="", help="comma-separated names; ours is always run")
    parser.add_argument("--json", nargs="?", const="-", help="write JSON to this file; without a file, print only it")
    parser.add_argument("--csv", help="write CSV to this file")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.ops) - set(ops)):
        parser.error(f"unknown op {unknown[0]!r}; expected {', '.join(ops)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    options = Options(
        smoke=arguments.smoke,
        rounds=arguments.rounds or (3 if arguments.smoke else Options.rounds),
        threads=arguments.threads or torch.get_num_threads(),
        device=arguments.device,
        providers=tuple(filter(None, arguments.providers.split(","))),
    )
    quiet = arguments.json == "-"
    machine = _machine(options)
    if not quiet:
        print(" | ".join(f"{name} {value}" for name, value in machine.items()))
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows = _run_all([op for op in ops if not arguments.ops or op in arguments.ops], options, quiet)
    except WrongResult as error:
        print(f"arpo-ext bench: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(previous_threads)
    _write(arguments, {"machine": machine, "rows": rows})
    return 0


def _run_all(ops: Iterable[str], options: Options, quiet: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for op in ops:
        module = importlib.import_module(f".bench_{op}", __package__)
        for case in module.cases(options):
            case_rows = run_case(case, options)
            rows += case_rows
            if not quiet:
                _print_case(case, case_rows)
    return rows


def run_case(case: Case, options: Options) -> list[dict[str, Any]]:
    """One row per provider: the case's columns, provider, times, rates, error, memory; or the reason it did not run."""
    running: list[_Running] = []
    refused: dict[str, str] = {}
    for index, provider in enumerate(case.providers):
        if index > 0 and options.providers and provider.name not in options.providers:
            continue
        try:
            running.append(_prepare(provider, case, options))
        except (Unavailable, BackendError, ImportError) as error:
            refused[provider.name] = str(error)
    probe = _Running("read", _read_probe(options))
    probe.call()
    order = [probe, *running]
    for _ in range(options.rounds):
        for entry in order:
            entry.samples_s.append(_sample(entry, options))
        order.append(order.pop(0))
    read_gbs = _READ_BYTES / statistics.median(probe.samples_s) / 1e9
    rows = [_row(case, entry, running[0], read_gbs) for entry in running]
    rows += [{**case.columns, "provider": name, "reason": reason} for name, reason in refused.items()]
    return rows


def _prepare(provider: Provider, case: Case, options: Options) -> _Running:
    entry = _Running(provider.name, provider.make())
    entry.error = case.error(entry.call())
    allowed = case.tolerance if provider.tolerance is None else provider.tolerance
    if not entry.error <= allowed:
        raise WrongResult(
            f"{dict(case.columns)}: {provider.name} is off by {entry.error:.3g}; expected at most {allowed:g}"
        )
    entry.peak_mb = _peak_mb(entry.call, options)
    once = _sample(entry, options)
    entry.repeats = max(1, min(10_000, int(_SAMPLE_S / max(once, 1e-7))))
    return entry


def _sample(entry: _Running, options: Options) -> float:
    """Seconds per call."""
    if entry.repeats > 1:
        entry.call()  # a short call finds its data in the cache whoever ran before
    _synchronize(options)
    start = time.perf_counter()
    for _ in range(entry.repeats):
        entry.call()
    _synchronize(options)
    return (time.perf_counter() - start) / entry.repeats


def _synchronize(options: Options) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize(options.device)


def _read_probe(options: Options) -> Callable[[], Any]:
    """Sum of 256 MiB of integers: torch's fastest pass that only reads."""
    data = torch.ones(_READ_BYTES // 8, dtype=torch.int64, device=options.device)
    return data.sum


def _peak_mb(call: Callable[[], Any], options: Options) -> float | None:
    """Memory in MiB that a call needed above what was there before, its results included; None where unknown."""
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(options.device)
        before = torch.cuda.memory_allocated(options.device)
        call()
        return (torch.cuda.max_memory_allocated(options.device) - before) / 2**20
    try:
        # Freed memory that the allocator kept would serve the call unseen.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the high-water mark restarts at the present size
        before = _status_kb("VmRSS")
        call()
        return max(0, _status_kb("VmHWM") - before) / 1024
    except OSError:
        return None


def _status_kb(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def _row(case: Case, entry: _Running, ours: _Running, read_gbs: float) -> dict[str, Any]:
    times_ms = [1e3 * seconds for seconds in sorted(entry.samples_s)]
    p20, p50, p80 = (_quantile(times_ms, share) for share in (0.2, 0.5, 0.8))
    rate_gbs = case.counted_bytes / p50 / 1e6
    return {
        **case.columns,
        "provider": entry.name,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "times_ours": p50 / (1e3 * statistics.median(ours.samples_s)),
        "counted_mb": case.counted_bytes / 1e6,
        "gbs": rate_gbs,
        "read_gbs": read_gbs,
        "share_of_read": rate_gbs / read_gbs,
        "max_error": entry.error,
        "peak_mb": entry.peak_mb,
    }


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest samples."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _machine(options: Options) -> dict[str, str | int]:
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    machine: dict[str, str | int] = {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": options.threads,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    if options.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(options.device)
    return machine


def _print_case(case: Case, rows: Sequence[Mapping[str, Any]]) -> None:
    print()
    title = "  ".join(f"{name}={value}" for name, value in case.columns.items())
    print(f"{title}  counted {case.counted_bytes / 1e6:.4g} MB  read bandwidth {rows[0].get('read_gbs', 0):.1f} GB/s")
    print(f"  {'provider':<26}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'x ours':>8}", end="")
    print(f"{'GB/s':>8}{'of read':>9}{'max error':>11}{'peak MiB':>10}")
    for row in rows:
        if "reason" in row:
            print(f"  {row['provider']:<26}  not run: {row['reason']}")
            continue
        peak = "?" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        print(f"  {row['provider']:<26}{row['p20_ms']:>10.4g}{row['p50_ms']:>10.4g}{row['p80_ms']:>10.4g}", end="")
        print(f"{row['times_ours']:>8.2f}{row['gbs']:>8.2f}{row['share_of_read']:>9.1%}", end="")
        print(f"{row['max_error']:>11.2g}{peak:>10}")


def _write(arguments: argparse.Namespace, result: Mapping[str, Any]) -> None:
    if arguments.json == "-":
        print(json.dumps(result))
    elif arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    if arguments.csv:
        names = list(dict.fromkeys(name for row in result["rows"] for name in row))
        with open(arguments.csv, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(result["rows"])
