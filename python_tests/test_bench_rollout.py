"""The simulated rollouts behind bench_rollout: the clock, the bound, and what lock-step rounds cost."""

import json

import pytest

from benchmarks import bench_rollout
from benchmarks._rollout_sim import Engine, Workload, bound_s, collector_makespan_s, lock_step_makespan_s


def test_one_path_alone_takes_the_bound_exactly():
    engine, workload = Engine(), Workload(prompts=1, paths=1, turns=2, tokens=10)
    expected = sum(workload.length(0, t) for t in range(3)) * engine.step_cost_s(1)
    expected += sum(workload.latency_s(0, t) for t in range(2))
    for makespan in (collector_makespan_s, lock_step_makespan_s, bound_s):
        assert makespan(engine, workload) == pytest.approx(expected)


def test_without_tools_both_are_bound_by_decoding():
    engine, workload = Engine(max_num_seqs=8), Workload(prompts=8, paths=4, turns=0, tokens=20)
    tokens = sum(workload.length(path, 0) for path in range(32))
    least = tokens * engine.step_cost_s(8) / 8
    assert bound_s(engine, workload) == pytest.approx(least)
    collector = collector_makespan_s(engine, workload)
    assert collector == pytest.approx(lock_step_makespan_s(engine, workload), rel=0.2)
    assert least <= collector < 1.5 * least


@pytest.mark.parametrize("max_num_seqs", [16, 512])
def test_no_schedule_beats_the_bound(max_num_seqs):
    engine = Engine(max_num_seqs=max_num_seqs)
    for seed in range(5):
        workload = Workload(prompts=8, seed=seed, tokens=12)
        bound = bound_s(engine, workload)
        assert collector_makespan_s(engine, workload) >= bound - 1e-9
        assert lock_step_makespan_s(engine, workload) >= bound - 1e-9


def test_the_benchmark_writes_its_rows_and_the_collector_is_ahead(tmp_path, capsys):
    path = tmp_path / "rollout.json"
    assert bench_rollout.main(["--sections", "simulated", "--seeds", "3", "--prompts", "16", "--json", str(path)]) == 0
    result = json.loads(path.read_text())["simulated"]
    assert len(result["rows"]) == 3
    assert all(row["collector_s"] < row["lock_step_s"] for row in result["rows"])
    assert result["medians"]["of_lock_step"] <= 0.6
    assert "of_bound" in capsys.readouterr().out


def test_a_new_sequence_costs_what_the_engine_says_of_it():
    engine, workload = Engine(step_s=0.01, token_s=0.0, admit_s=0.5), Workload(prompts=1, paths=1, turns=2, tokens=10)
    expected = sum(workload.length(0, t) for t in range(3)) * 0.01 + 3 * 0.5
    expected += sum(workload.latency_s(0, t) for t in range(2))
    for makespan in (collector_makespan_s, lock_step_makespan_s, bound_s):
        assert makespan(engine, workload) == pytest.approx(expected)


def test_recorded_latencies_are_drawn_alike_for_every_scheduler():
    workload = Workload(recorded=(0.25, 4.0), seed=3)
    drawn = [workload.latency_s(path, turn) for path in range(100) for turn in range(3)]
    assert set(drawn) == {0.25, 4.0}
    assert 100 < drawn.count(4.0) < 200
    assert drawn == [workload.latency_s(path, turn) for path in range(100) for turn in range(3)]
