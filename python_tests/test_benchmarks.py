"""How benchmarks measure: on a made-up op whose providers are right, wrong, broken or absent."""

import csv
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from arpo_ext import ops
from benchmarks import BENCHES, _harness, _installed, _measure, tables
from benchmarks._harness import Case, Provider, Unavailable
from benchmarks.bars import CPU_BARS, GPU_BARS, Bar

MIB = 1 << 20


def returning(value):
    return lambda: lambda: value


def raising(error):
    def make():
        raise error

    return make


def failing():
    def call():
        raise RuntimeError("out of registers\nsecond line")

    return call


RIGHT = Provider("arpo-ext", returning(1.0))
PEERS = [
    Provider("exact peer", returning(1.0)),
    Provider("coarse peer", returning(1.05), tolerance=0.1),
    Provider("wrong peer", returning(2.0)),
    Provider("NaN peer", returning(float("nan"))),
    Provider("absent peer", raising(Unavailable("peer is not installed: pip install peer==1 --no-deps"))),
    Provider("broken peer", failing),
]


@pytest.fixture
def bench(monkeypatch):
    """bench(providers, *argv, **case) runs a case of these providers and returns (exit code, rows, printed)."""

    def run(providers, *argv, capture, **fields):
        def cases(options):
            columns = {"op": "fake", "N": 3}
            yield Case(columns, 8 * MIB, providers, lambda result: abs(result - 1.0), 1e-3, **fields)

        module = types.ModuleType("benchmarks.bench_fake")
        module.cases = cases
        monkeypatch.setitem(sys.modules, module.__name__, module)
        code = _harness.main(["--smoke", "--device", "cpu", "--json", *argv], ("fake",))
        return code, json.loads(capture.readouterr().out)

    return run


def by_provider(result):
    return {row["provider"]: row for row in result["rows"]}


def test_peers_that_cannot_run_or_are_wrong_are_listed_with_the_reason(bench, capsys):
    code, result = bench([RIGHT, *PEERS], capture=capsys)
    rows = by_provider(result)
    assert code == 0
    assert set(rows) == {"arpo-ext", *(peer.name for peer in PEERS)}
    assert rows["exact peer"]["times_ours"] > 0
    assert rows["coarse peer"]["max_error"] == pytest.approx(0.05)
    assert rows["wrong peer"]["reason"] == "wrong result at op=fake N=3: wrong peer is off by 1, allowed is 0.001"
    assert "NaN peer is off by nan" in rows["NaN peer"]["reason"]
    assert rows["absent peer"]["reason"] == "peer is not installed: pip install peer==1 --no-deps"
    assert rows["broken peer"]["reason"] == "RuntimeError: out of registers"
    assert "p50_ms" not in rows["wrong peer"]


def test_a_wrong_result_of_ours_is_not_timed_and_ends_with_exit_code_1(bench, capsys):
    code, result = bench([Provider("arpo-ext", returning(1.1)), PEERS[0]], capture=capsys)
    rows = by_provider(result)
    assert code == 1
    assert "arpo-ext is off by 0.1" in rows["arpo-ext"]["reason"]
    assert rows["exact peer"]["times_ours"] is None


def test_an_error_of_ours_is_not_hidden(bench, capsys):
    with pytest.raises(RuntimeError, match="out of registers"):
        bench([Provider("arpo-ext", failing)], capture=capsys)


def test_shares_are_those_of_the_floor_and_of_the_limit(bench, capsys):
    floor = Provider("bare product", returning(None), floor=True)
    code, result = bench([RIGHT, floor], capture=capsys, flops=10**9, limit="copy")
    row = by_provider(result)["arpo-ext"]
    assert code == 0
    assert by_provider(result)["bare product"]["max_error"] is None
    assert row["floor"] == "bare product"
    assert row["share_of_floor"] == pytest.approx(by_provider(result)["bare product"]["p50_ms"] / row["p50_ms"])
    assert row["gbs"] == pytest.approx(8 * MIB / row["p50_ms"] / 1e6)
    assert row["share_of_limit"] == pytest.approx(row["gbs"] / row["copy_gbs"])
    assert row["tflops"] == pytest.approx(1 / row["p50_ms"])


def test_only_the_named_providers_run_besides_ours_and_the_floor(bench, capsys):
    floor = Provider("bare product", returning(None), floor=True)
    _, result = bench([RIGHT, floor, *PEERS], "--providers", "coarse peer", capture=capsys)
    assert set(by_provider(result)) == {"arpo-ext", "bare product", "coarse peer"}


def test_a_case_measured_once_calls_each_provider_once(bench, capsys):
    calls = []

    def counting():
        return lambda: calls.append(1) or 1.0

    _, result = bench([Provider("arpo-ext", counting)], capture=capsys, once=True)
    assert len(calls) == 1
    assert by_provider(result)["arpo-ext"]["rounds"] == 1


def test_slow_cases_get_fewer_rounds(bench, capsys, monkeypatch):
    monkeypatch.setattr(_harness, "_CASE_S", 0.0)
    _, result = bench([RIGHT], "--rounds", "50", capture=capsys)
    assert by_provider(result)["arpo-ext"]["rounds"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_the_call_added():
    meter = _measure.Meter("cpu", smoke=True)

    def temporary():
        first = torch.ones(32 * MIB, dtype=torch.int8)
        return (first + first)[:MIB].clone()

    _, peak_mb = meter.peak_mb(temporary)
    assert 64 <= peak_mb < 80
    _, nothing = meter.peak_mb(lambda: None)
    assert nothing < 2


def test_quantiles_interpolate():
    assert [_measure.quantile([1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1, 1.5, 2, 3, 4]


def test_the_machine_record_names_the_peers_versions(bench, capsys):
    _, result = bench([RIGHT], capture=capsys)
    assert {"date", "cpu", "cores", "threads", "torch"} <= set(result["machine"])
    assert _installed.installed_versions().items() <= result["machine"].items()


def test_files_hold_all_rows(bench, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    paths = {kind: tmp_path / f"rows.{kind}" for kind in ("csv", "svg", "png")}
    for kind in ("svg", "png"):
        _, result = bench([RIGHT, *PEERS], "--csv", str(paths["csv"]), "--plot", str(paths[kind]), capture=capsys)
    with open(paths["csv"], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [row["provider"] for row in result["rows"]]
    assert {row["reason"] for row in rows if row["provider"] == "broken peer"} == {"RuntimeError: out of registers"}
    picture = paths["svg"].read_text(encoding="utf-8")
    assert picture.startswith("<?xml")
    assert paths["png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_plot_that_cannot_be_written_is_refused_before_the_run(bench, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        bench([RIGHT], "--plot", "rows.txt", capture=capsys)
    assert "--plot writes .svg or .png, got 'rows.txt'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        bench([RIGHT], "--plot", "rows.svg", capture=capsys)
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def row(provider, **fields):
    return {"op": "fake", "N": 3, "dtype": "float32", "provider": provider, **fields}


ROWS = [
    row("arpo-ext", p50_ms=2.0, gbs=12.3, limit="read", share_of_limit=0.5, peak_mb=None, times_ours=1.0),
    row("arpo-ext cpu-avx2", p50_ms=3.0, times_ours=1.5),
    row("arpo-ext triton", p50_ms=1.0, times_ours=0.5),
    row("peer", p50_ms=300.0, times_ours=150.4),
    row("absent", reason="peer is not installed"),
]


def test_a_table_shows_ours_beside_every_other_way():
    assert tables.op_table("fake", ROWS).splitlines() == [
        "| `fake` | ours, ms | rate | of limit | peak MiB | arpo-ext triton | peer | absent |",
        "|---|---|---|---|---|---|---|---|",
        "| N=3 dtype=float32 | 2 | 12.3 GB/s | 50% of read | ? | 0.5x | 150x | not run |",
    ]


def test_a_bar_takes_the_worst_case_and_says_when_it_is_missed_or_not_measured():
    rows = [*ROWS, {**row("peer", times_ours=9.0), "N": 4}]
    three, four, five = ({"op": "fake", "N": n} for n in (3, 4, 5))

    def least(*cases):
        return Bar("claim", cases, "times_ours", "peer", 10, unit="x")

    for bar, value, holds in ((least(three), 150.4, True), (least(three, four), 9.0, False)):
        assert bar.measured(rows) == value
        assert bar.holds(value) is holds
    assert least(three, five).measured(rows) is None
    most = Bar("claim", (three,), "p50_ms", most=1.5, unit="ms")
    assert (most.wanted(), most.shown(most.measured(rows)), most.holds(2.0)) == ("at most 1.5 ms", "2 ms", False)


def test_tables_between_marks_are_rewritten_and_unknown_ones_refused(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "fake", lambda: "new")
    text = "before\n<!-- table fake -->\nold\n<!-- end -->\nafter\n<!-- table fake -->\n<!-- end -->\n"
    table = "<!-- table fake -->\nnew\n<!-- end -->\n"
    assert tables.rendered(text) == f"before\n{table}after\n{table}"
    assert tables.rendered(tables.rendered(text)) == tables.rendered(text)
    with pytest.raises(ValueError, match="no table 'other'; expected one of ops_cpu"):
        tables.rendered("<!-- table other -->\n<!-- end -->")


def test_every_op_is_in_the_run_of_all():
    folder = Path(ops.__file__).parent
    assert {path.stem.removesuffix("_reference") for path in folder.glob("*_reference.py")} == set(BENCHES)
    assert {case["op"] for bar in (*CPU_BARS, *GPU_BARS) for case in bar.cases} <= set(BENCHES)


@pytest.mark.gpu
def test_device_time_is_that_of_the_call_alone():
    meter = _measure.Meter("cuda", smoke=True)
    small = torch.ones(1024, device="cuda")
    large = torch.ones(256 * MIB, device="cuda")
    short, long = (meter.sample(data.sum, 5) for data in (small, large))
    assert short.seconds < 1e-4
    assert long.seconds > 5 * short.seconds
    assert short.host_s is not None
