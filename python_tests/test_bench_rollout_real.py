"""What bench_rollout measures for real: the played sampler, the fit of the engine's speed, and both on vLLM."""

import json
import time

import pytest

from arpo_ext.rollout import Completion
from arpo_ext.types import StopReason
from benchmarks import _rollout_real, bench_rollout, tables
from benchmarks._rollout_real import Step, collect_s, fitted_engine, lock_step_s
from benchmarks._rollout_sim import Workload


class Engine:
    """A sampler whose steps take a millisecond; its tokens are all different."""

    vocab_size, max_model_len = 1 << 16, 1 << 16

    def __init__(self):
        self.open, self.seen, self.resets, self.made = {}, [], 0, 0

    @property
    def num_unfinished(self):
        return len(self.open)

    def submit(self, request):
        self.open[request.id] = (request, [])
        self.seen.append(request)

    def step(self):
        time.sleep(0.001)
        events = []
        for id, (request, tokens) in list(self.open.items()):
            self.made += 1
            tokens.append(100_000 + self.made)
            if len(tokens) == request.max_tokens:
                del self.open[id]
                zeros = (0.0,) * len(tokens)
                events.append(Completion(id, tuple(tokens), zeros, zeros, StopReason.LENGTH))
        return events

    def abort(self, id):
        self.open.pop(id, None)

    def reset_prefix_cache(self):
        self.resets += 1


WORKLOAD = Workload(prompts=3, paths=2, turns=2, tokens=6, median_s=0.02, seed=4)


@pytest.mark.parametrize("run", [collect_s, lock_step_s])
def test_both_schedulers_play_every_turn_of_the_trace(run):
    engine = Engine()
    seconds, steps = run(engine, WORKLOAD)
    assert engine.resets == 1
    asked = sorted((len(r.tokens) > _rollout_real.PROMPT_TOKENS, r.max_tokens) for r in engine.seen)
    lengths = [(turn > 0, WORKLOAD.length(path, turn)) for path in range(6) for turn in range(3)]
    assert asked == sorted(lengths)
    assert engine.made == sum(length for _, length in lengths) == sum(step.sequences for step in steps)
    assert sum(step.new for step in steps) == 18
    # What the model reads is what it wrote and what the tools said, in order.
    by_tokens = {request.tokens for request in engine.seen}
    for request in engine.seen:
        tokens = request.tokens
        if len(tokens) > _rollout_real.PROMPT_TOKENS:
            begin = max((t for t in by_tokens if tokens[: len(t)] == t and len(t) < len(tokens)), key=len)
            turn = tokens[len(begin) : -_rollout_real.RESULT_TOKENS]
            assert all(token > 100_000 for token in turn)
    longest = max(sum(WORKLOAD.latency_s(path, turn) for turn in range(2)) for path in range(6))
    assert seconds > longest


def test_lock_step_waits_for_the_slowest_of_every_round():
    seconds, _ = lock_step_s(Engine(), WORKLOAD)
    assert seconds > sum(max(WORKLOAD.latency_s(path, turn) for path in range(6)) for turn in range(2))


def test_the_fit_finds_the_cost_of_a_step_and_keeps_the_total():
    shapes = [(n, m) for n in (1, 4, 9, 32) for m in (0, 1, 3)]
    exact = [Step(n, m, 0.004 + 0.0002 * n + 0.001 * m) for n, m in shapes]
    engine = fitted_engine(exact, max_num_seqs=7)
    assert (engine.step_s, engine.token_s, engine.admit_s) == pytest.approx((0.004, 0.0002, 0.001))
    assert engine.max_num_seqs == 7
    # A cost that falls with the sequences is not believed; the total stays.
    falling = [Step(n, m, 0.05 - 0.001 * n) for n, m in shapes]
    engine = fitted_engine(falling)
    assert min(engine.step_s, engine.token_s, engine.admit_s) >= 0
    total = sum(engine.step_cost_s(step.sequences, step.new) for step in falling)
    assert total == pytest.approx(sum(step.seconds for step in falling))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_section_runs_and_is_shown(tmp_path, monkeypatch, capsys):
    pytest.importorskip("vllm")
    path, latencies = tmp_path / "rollout.json", tmp_path / "latencies.json"
    latencies.write_text(json.dumps({"seconds": [0.01, 0.02, 0.5]}))
    monkeypatch.setattr(bench_rollout, "LATENCIES", latencies)
    assert bench_rollout.main(["--smoke", "--sections", "simulated", "recorded", "--json", str(path)]) == 0
    assert bench_rollout.main(["--smoke", "--sections", "real", "monitor", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert list(result) == ["simulated", "recorded", "real", "monitor"]
    for scheduler in result["real"]["schedulers"].values():
        assert scheduler["of_simulated"] > 0.5
    rows = {(row["monitor"], row["prefix_cache"]): row for row in result["monitor"]["rows"]}
    assert len(rows) == 6
    for monitor in ("none", "entropy", "logprobs=10"):
        assert rows[monitor, True]["prompt_tokens"] < rows[monitor, False]["prompt_tokens"]
    (tmp_path / "results").mkdir()
    path.rename(tmp_path / "results" / "rollout.json")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    shown = tables.rendered("<!-- table makespan -->\n<!-- end -->\n<!-- table monitor -->\n<!-- end -->")
    assert "median of 2 | " in shown
    assert shown.count("| logprobs=10 |") == 2
    assert "== monitor" in capsys.readouterr().out
