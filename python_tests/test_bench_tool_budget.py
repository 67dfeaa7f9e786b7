"""bench_tool_budget on the embedded task's files with a scripted sampler in the engine's place."""

import json
import random
import sys
import types

import pytest

from arpo_ext.config import dump_config, load_config
from arpo_ext.rollout import Completion
from arpo_ext.types import StopReason
from benchmarks import bench_tool_budget, tables
from examples.lookup_and_compute.build import build
from examples.lookup_and_compute.demo import CONFIGS


class Searcher:
    """Searches for one of three things, then answers; more uncertain after a result than at the start."""

    vocab_size, max_model_len = 143, 256

    def __init__(self, folder, engine, rollout, renderer, seed):
        self.renderer, self.open = renderer, []

    @property
    def num_unfinished(self):
        return len(self.open)

    def submit(self, request):
        self.open.append(request)

    def step(self):
        events = [self._complete(request) for request in self.open]
        self.open = []
        return events

    def _complete(self, request):
        answered = "<result>" in self.renderer.decode(request.tokens)
        thing = random.Random(request.seed).choice(["bornak", "kelmir", "zandov"])
        text = "<answer>\\boxed{12}</answer>" if answered else f"<search>mass of {thing}</search>"
        tokens = tuple(self.renderer.tokenizer.encode(text, add_special_tokens=False))
        entropies = (0.9 if answered else 0.1,) * len(tokens)
        reason = StopReason.EOS if answered else StopReason.TOOL
        return Completion(request.id, tokens, (-0.1,) * len(tokens), entropies, reason)

    def abort(self, id): ...

    def reset_prefix_cache(self): ...

    def close(self): ...


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build(folder / "data", 0)
    (folder / "sft_2").mkdir()
    (folder / "data" / "model").rename(folder / "sft_2" / "model")
    (folder / "train").mkdir()
    (folder / "train" / "config.yaml").write_text(dump_config(load_config(CONFIGS / "train.yaml")))
    return folder


def test_policies_are_compared_on_the_same_answers(run, tmp_path, monkeypatch, capsys):
    module = types.ModuleType("arpo_ext.rollout.vllm_sampler")
    module.VllmSampler = Searcher
    monkeypatch.setitem(sys.modules, module.__name__, module)
    out, latencies = tmp_path / "results" / "tool_budget.json", tmp_path / "latencies.json"
    out.parent.mkdir()
    arguments = ["--run", str(run), "--seeds", "2", "--prompts", "3", "--paths", "6", "--initial-paths", "2"]
    assert bench_tool_budget.main([*arguments, "--json", str(out), "--latencies", str(latencies)]) == 0
    result = json.loads(out.read_text())
    rows = {row["policy"]: row for row in result["rows"]}
    assert list(rows) == ["paper", "random", "chain"]
    # A chain searches once a path. Entropy rises behind every result, so paper forks at both of each prompt.
    assert rows["chain"]["tool_calls"] == [18, 18]
    assert rows["paper"]["forks"] == [6, 6]
    assert rows["paper"]["tool_calls"] == [12, 12]
    assert rows["paper"]["fresh_paths"] == [6, 6]
    # Three things to search for: no more calls than that reach the tool.
    assert set(rows["chain"]["ran"]) <= {1, 2, 3}
    recorded = json.loads(latencies.read_text())
    assert len(recorded["seconds"]) == recorded["tools"]["search"] == sum(sum(row["ran"]) for row in rows.values())
    monkeypatch.setattr(tables, "HERE", tmp_path)
    shown = tables.rendered("<!-- table tool_budget -->\n<!-- end -->")
    assert "| `paper` | 12 | 12 to 12 | 67% |" in shown
    assert "3 prompts, M = 6, N = 2, means of 2 seeds:" in shown
    assert "paper" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
    assert bench_tool_budget.main(["--run", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bench_tool_budget: config file ")
