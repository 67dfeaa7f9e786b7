"""How rows are printed and written."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def print_machine(machine: Mapping[str, Any]) -> None:
    print(" | ".join(f"{name} {value}" for name, value in machine.items()))


def print_case(columns: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a provider: times, rate, share of the limit, error, memory; or why it did not run."""
    timed = next((row for row in rows if "reason" not in row), None)
    print()
    print("  ".join(f"{name}={value}" for name, value in columns.items()), end="")
    if timed is None:
        print()
    else:
        print(f"  counted {timed['counted_mb']:.4g} MB", end="")
        print(f" {timed['gflop']:.4g} GFLOP" if "gflop" in timed else "", end="")
        print(f"  read {timed['read_gbs']:.1f} GB/s, copy {timed['copy_gbs']:.1f} GB/s  {timed['rounds']} rounds")
        limit = f"of {timed['floor']}" if "floor" in timed else f"of {timed['limit']}"
        print(f"  {'provider':<28}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'x ours':>8}{'GB/s':>9}", end="")
        print(f"{limit:>17}{'max error':>11}{'peak MiB':>10}{'host us' if 'host_ms' in timed else '':>9}")
    for row in rows:
        if "reason" in row:
            print(f"  {row['provider']:<28}  not run: {row['reason']}")
            continue
        share = row["share_of_floor"] if "floor" in row else row["share_of_limit"]
        print(f"  {row['provider']:<28}{row['p20_ms']:>10.4g}{row['p50_ms']:>10.4g}{row['p80_ms']:>10.4g}", end="")
        ratio = "?" if row["times_ours"] is None else f"{row['times_ours']:.2f}"
        print(f"{ratio:>8}{row['gbs']:>9.2f}{share:>17.1%}", end="")
        print(f"{'' if row['max_error'] is None else format(row['max_error'], '.2g'):>11}", end="")
        print(f"{'?' if row['peak_mb'] is None else format(row['peak_mb'], '.0f'):>10}", end="")
        print(f"{1e3 * row['host_ms']:>9.0f}" if "host_ms" in row else "")


def write_json(path: str, result: Mapping[str, Any]) -> None:
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_csv(path: str, result: Mapping[str, Any]) -> None:
    """One line a row, with the columns of all ops."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(result["rows"])
