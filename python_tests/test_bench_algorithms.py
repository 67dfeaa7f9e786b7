"""The benchmark of the algorithms: its numbers from made-up runs, and one small run of everything."""

import json

import pytest

from benchmarks import bench_algorithms
from benchmarks.tables import algorithms_table

ROW = {"train/clip_fraction": 0.25, "train/entropy": 0.5, "rollout/tool_calls": 3.0, "rollout/sampled_tokens": 10.0}


def made(rewards):
    return bench_algorithms.summary([{**ROW, "reward/mean": reward} for reward in rewards])


def test_the_rise_is_counted_in_standard_errors():
    row = made([0.0, 0.2, 9.0, 9.0, 1.0, 1.4])
    # Variances 0.02 and 0.08 of two steps each: sqrt(0.01 + 0.04).
    assert (row["first"], row["last"]) == pytest.approx((0.1, 1.2))
    assert row["standard_error"] == pytest.approx(0.05**0.5, abs=1e-4)
    assert row["standard_errors"] == pytest.approx(1.1 / 0.05**0.5, abs=0.01)
    assert (row["steps"], row["tool_calls"], row["sampled_tokens"], row["clip_fraction"]) == (6, 18, 60, 0.25)
    assert bench_algorithms.learns(row)
    assert not bench_algorithms.learns(made([0.0, 0.2, 9.0, 9.0, 0.2, 0.4]))
    assert not bench_algorithms.learns(made([1.0] * 6))


def test_the_table_says_what_was_missed():
    rows = [
        {"algorithm": name, **made(r)} for name, r in (("up", [0, 0.2, 0, 0, 1, 1.4]), ("flat", [0, 1, 0, 0, 1, 0]))
    ]
    up, flat = algorithms_table({"rows": rows}).splitlines()[2:]
    assert "missed" not in up
    assert "| 0.0, missed |" in flat


def test_wrong_names_and_too_few_steps_are_refused(capsys):
    for arguments, sentence in (
        (["gpro"], "got gpro; expected names of arpo"),
        (["grpo", "--steps", "5"], "at least 6"),
    ):
        with pytest.raises(SystemExit):
            bench_algorithms.main(arguments)
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.vllm
def test_a_small_run_of_everything(tmp_path, capsys):
    path = tmp_path / "algorithms.json"
    arguments = ["dapo", "--smoke", "--steps", "6", "--out", str(tmp_path / "out"), "--json", str(path)]
    assert bench_algorithms.main(arguments) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["algorithm"] == "dapo"
    assert len(row["rewards"]) == 6
    assert row["tool_calls"] > 0
    assert "dapo" in capsys.readouterr().out
