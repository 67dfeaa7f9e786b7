"""How every benchmark measures, checks and prints.

A benchmark module `bench_<op>.py` defines

    def cases(options: Options) -> Iterator[Case]      # yield one at a time, so that its tensors can be freed
    def main(argv=None) -> int: return _harness.main(argv, ("<op>",))
    if __name__ == "__main__": raise SystemExit(main())

and `BENCHES` in `__init__.py` lists `<op>`. A `Case` is one op at one shape with all its providers; the first provider
is ours and the others are compared with it. `options.smoke` asks for small shapes: a smoke run of one op should take
seconds, because the tests run it.

The protocol, the same for all: each provider is set up untimed (compile, allocate, warm up) and its result is checked
against the case's reference. A wrong result is never timed: one of ours makes the exit code 1, a peer's is printed.
Then rounds, in rotating order: each round times every provider once, and the machine's read and copy bandwidth once, so
that a disturbance hits all alike; a case of slow providers gets fewer rounds. Reported are the 20th, 50th and 80th
percentile; GB/s are the counted bytes (what the op must move, not what a provider happens to move) over the median. A
provider that cannot run is listed with its reason. How a call is timed is in `_measure`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from arpo_ext.ops import BackendError

from . import _output, _plot
from ._measure import Meter, Sample, machine, quantile

_CASE_S = 100.0  # rounds are cut, to three at least, where a case would take longer
_PACKAGES = ("arpo-ext", "triton", "trl", "verl", "liger-kernel")


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
    """make() prepares, and returns the call to time. tolerance: largest error allowed; None takes the case's.

    floor: it does a part of the work that no provider of the case can avoid, such as the bare matrix product; its
    result is not compared, and the others' times are given as shares of the first such floor.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    tolerance: float | None = None
    floor: bool = False


@dataclass(frozen=True)
class Case:
    """columns: what identifies the case, such as {"op", "pass", "N", "V", "dtype"}. counted_bytes: see the module.
    error(result): largest absolute difference between a provider's result and the reference; NaN counts as wrong.
    limit: the bandwidth that bounds the op. flops: of the matrix products it must do. once: too slow for rounds; the
    first call alone is checked, timed and its memory measured."""

    columns: Mapping[str, str | int]
    counted_bytes: int
    providers: Sequence[Provider]
    error: Callable[[Any], float]
    tolerance: float
    limit: Literal["read", "copy"] = "read"
    flops: int = 0
    once: bool = False


@dataclass
class _Running:
    name: str
    call: Callable[[], Any]
    repeats: int = 1
    error: float | None = None
    peak_mb: float | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)


def main(argv: Sequence[str] | None, ops: Sequence[str]) -> int:
    """Run the benchmarks of `ops`, or those of them that `argv` names, and print or write the rows."""
    arguments = _parsed(argv, ops)
    options = Options(
        smoke=arguments.smoke,
        rounds=arguments.rounds or (3 if arguments.smoke else Options.rounds),
        threads=arguments.threads or torch.get_num_threads(),
        device=arguments.device,
        providers=tuple(filter(None, arguments.providers.split(","))),
    )
    quiet = arguments.json == "-"
    result: dict[str, Any] = {"machine": machine(options.device, options.threads, _PACKAGES), "rows": []}
    if not quiet:
        _output.print_machine(result["machine"])
    wrong: list[str] = []
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for case, rows in _run_all([op for op in ops if not arguments.ops or op in arguments.ops], options):
            result["rows"] += rows
            wrong += [row["reason"] for row in rows if row.get("wrong") and _is_ours(row["provider"])]
            if not quiet:
                _output.print_case(case.columns, rows)
                sys.stdout.flush()
            if arguments.json and not quiet:
                _output.write_json(arguments.json, result)  # after every case: a long run may be cut
    finally:
        torch.set_num_threads(previous_threads)
    _write(arguments, result)
    for reason in wrong:
        print(f"arpo-ext bench: {reason}", file=sys.stderr)
    return 1 if wrong else 0


def _parsed(argv: Sequence[str] | None, ops: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="arpo-ext bench", description="Time ops against peers and the memory limit.")
    parser.add_argument("ops", nargs="*", help=f"which of: {', '.join(ops)} (default: all)")
    parser.add_argument("--smoke", action="store_true", help="small shapes: does everything still run")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 11; smoke 3)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", default="", help="comma-separated names; ours and floors are always run")
    parser.add_argument("--json", nargs="?", const="-", help="write JSON to this file; without a file, print only it")
    parser.add_argument("--csv", help="write CSV to this file")
    parser.add_argument("--plot", type=_plot.checked_path, help="draw the rows into this .svg or .png file")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.ops) - set(ops)):
        parser.error(f"unknown op {unknown[0]!r}; expected {', '.join(ops)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch finds no NVIDIA GPU")
    return arguments


def _run_all(ops: Iterable[str], options: Options) -> Iterator[tuple[Case, list[dict[str, Any]]]]:
    meter = Meter(options.device, options.smoke)
    for op in ops:
        for case in importlib.import_module(f".bench_{op}", __package__).cases(options):
            yield case, run_case(case, options, meter)


def _is_ours(name: str) -> bool:
    return name.startswith("arpo-ext")


def run_case(case: Case, options: Options, meter: Meter) -> list[dict[str, Any]]:
    """One row per provider: the case's columns, provider, times, rates, error, memory; or the reason it did not run."""
    running: list[_Running] = []
    refused: list[dict[str, Any]] = []
    for index, provider in enumerate(case.providers):
        if index > 0 and options.providers and not provider.floor and provider.name not in options.providers:
            continue
        try:
            running.append(_prepare(provider, case, meter))
        except (Unavailable, BackendError, ImportError) as error:
            refused.append({"provider": provider.name, "reason": str(error)})
        except WrongResult as error:
            refused.append({"provider": provider.name, "reason": str(error), "wrong": True})
        except Exception as error:  # whatever a peer may raise must not end the run
            if _is_ours(provider.name):
                raise
            first = (str(error).strip() or "no message").splitlines()[0]
            refused.append({"provider": provider.name, "reason": f"{type(error).__name__}: {first}"})
    probes = [_Running(name, call) for name, call in meter.probes.items()]
    _time(running, probes, case, options, meter)
    ours = next((entry for entry in running if entry.name == case.providers[0].name), None)
    bandwidth = {f"{probe.name}_gbs": meter.probe_bytes[probe.name] / probe.median_s / 1e9 for probe in probes}
    floor = next((entry for entry in running if any(p.floor and p.name == entry.name for p in case.providers)), None)
    rows = [_row(case, entry, ours, floor, bandwidth) for entry in running]
    return rows + [{**case.columns, **row} for row in refused]


def _prepare(provider: Provider, case: Case, meter: Meter) -> _Running:
    entry = _Running(provider.name, provider.make())
    # The first call may compile, load and cache; memory and time are those of a later one, unless there is none.
    result, entry.peak_mb, first = _observed(entry.call, meter)
    if not provider.floor:
        entry.error = case.error(result)
        allowed = case.tolerance if provider.tolerance is None else provider.tolerance
        if not entry.error <= allowed:
            where = " ".join(f"{name}={value}" for name, value in case.columns.items())
            raise WrongResult(
                f"wrong result at {where}: {provider.name} is off by {entry.error:.3g}, allowed is {allowed:g}"
            )
    del result
    if case.once:
        entry.samples.append(first)
        return entry
    _, entry.peak_mb, second = _observed(entry.call, meter)
    entry.repeats = meter.repeats(second.seconds)
    return entry


def _observed(call: Callable[[], Any], meter: Meter) -> tuple[Any, float | None, Sample]:
    results: list[Any] = []
    samples: list[Sample] = []

    def keeping() -> None:
        samples.append(meter.sample(lambda: results.append(call())))

    _, peak_mb = meter.peak_mb(keeping)
    return results[0], peak_mb, samples[0]


def _time(running: Sequence[_Running], probes: Sequence[_Running], case: Case, options: Options, meter: Meter) -> None:
    for probe in probes:
        probe.call()
    order = [*probes, *(() if case.once else running)]
    rounds = 3 if case.once else options.rounds
    done = 0
    spent_s = 0.0
    while done < rounds and (done < 3 or spent_s < _CASE_S):
        for entry in order:
            entry.samples.append(meter.sample(entry.call, entry.repeats))
            spent_s += entry.samples[-1].seconds * entry.repeats
        order.append(order.pop(0))
        done += 1


def _row(
    case: Case, entry: _Running, ours: _Running | None, floor: _Running | None, bandwidth: Mapping[str, float]
) -> dict[str, Any]:
    times_ms = [1e3 * sample.seconds for sample in sorted(entry.samples)]
    p20, p50, p80 = (quantile(times_ms, share) for share in (0.2, 0.5, 0.8))
    rate_gbs = case.counted_bytes / p50 / 1e6
    row = {
        **case.columns,
        "provider": entry.name,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "rounds": len(entry.samples),
        "times_ours": entry.median_s / ours.median_s if ours else None,
        "counted_mb": case.counted_bytes / 1e6,
        "gbs": rate_gbs,
        **bandwidth,
        "limit": case.limit,
        "share_of_limit": rate_gbs / bandwidth[f"{case.limit}_gbs"],
        "max_error": entry.error,
        "peak_mb": entry.peak_mb,
    }
    if case.flops:
        row |= {"gflop": case.flops / 1e9, "tflops": case.flops / p50 / 1e9}
    if floor is not None:
        row |= {"floor": floor.name, "share_of_floor": floor.median_s / entry.median_s}
    if entry.samples[0].host_s is not None:
        row["host_ms"] = 1e3 * statistics.median(sample.host_s or 0.0 for sample in entry.samples)
    return row


def _write(arguments: argparse.Namespace, result: Mapping[str, Any]) -> None:
    if arguments.json == "-":
        print(json.dumps(result))
    elif arguments.json:
        _output.write_json(arguments.json, result)
    if arguments.csv:
        _output.write_csv(arguments.csv, result)
    if arguments.plot:
        _plot.write_plot(arguments.plot, result)
