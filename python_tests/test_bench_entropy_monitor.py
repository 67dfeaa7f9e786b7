"""The benchmark of the entropy processor's own time runs, checks what it times, and says what it must."""

import json

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("default")]


def test_the_smoke_run_writes_its_row(tmp_path, capsys):
    from benchmarks import bench_entropy_monitor

    threads = torch.get_num_threads()
    try:
        assert bench_entropy_monitor.main(["--smoke", "--json", str(tmp_path / "monitor.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    (row,) = json.loads((tmp_path / "monitor.json").read_text())["rows"]
    assert row["steps"] > 5
    assert 0 < row["share"] < 0.5
    assert row["step_ms"] > 0
    assert "logprobs=10" in capsys.readouterr().out
