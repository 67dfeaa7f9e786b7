"""Evaluation in chains: means, standard errors and costs against a scripted sampler with known answers."""

from __future__ import annotations

import math

import pytest

from arpo_ext.config import Config
from arpo_ext.evaluation.metrics import METRICS, evaluate, summarize
from arpo_ext.render import Renderer
from arpo_ext.rollout import Completion
from arpo_ext.tools import ToolPool
from arpo_ext.types import Leaf, Prompt, RolloutTree, Segment, StopReason, ToolResult

CALL = "<think>look up</think><search>mass</search>"
RIGHT = r"<think>got it</think><answer>\boxed{47}</answer>"
WRONG = r"<think>got it</think><answer>\boxed{12}</answer>"
MALFORMED = "47"


class Search:
    """Answers every question with 47."""

    name, timeout_s, workers = "search", 5.0, 1

    def start(self) -> None: ...
    def close(self) -> None: ...
    def run(self, text: str) -> ToolResult:
        return ToolResult("search", "47", ok=True)


class ScriptedSampler:
    """Writes the turns that `script(question, seed, greedy)` gives, one whole turn a step."""

    vocab_size, max_model_len = 200, 400

    def __init__(self, renderer, script):
        self.renderer, self.script = renderer, script
        self.requests = []
        self.waiting = []

    @property
    def num_unfinished(self):
        return len(self.waiting)

    def submit(self, request):
        self.requests.append(request)
        self.waiting.append(request)

    def step(self):
        done, self.waiting = self.waiting, []
        return [self.complete(request) for request in done]

    def complete(self, request):
        text = self.renderer.decode(request.tokens)
        question, *answered = text.split("<result>")
        turn = self.script(question.split("<think>")[0], request.seed, request.greedy)[len(answered)]
        stop = StopReason.TOOL if turn.endswith("</search>") else StopReason.EOS
        tokens = self.renderer.tokenizer.encode(turn, add_special_tokens=False)
        if stop is StopReason.EOS:
            tokens.append(self.renderer.tokenizer.eos_token_id)
        return Completion(request.id, tuple(tokens), (-0.5,) * len(tokens), (0.25,) * len(tokens), stop)

    def abort(self, id): ...
    def push_weights(self, weights): ...
    def reset_prefix_cache(self): ...


@pytest.fixture
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search"])


def prompts(*questions: str) -> list[Prompt]:
    return [Prompt(f"q{i}", ({"role": "user", "content": text},), ("47",)) for i, text in enumerate(questions)]


def run(renderer, script, questions, *, mode="sampled", samples=1, **more):
    sampler = ScriptedSampler(renderer, script)
    config = Config.model_validate(
        {"eval": {"samples_per_prompt": samples}, "rollout": {"paths": 6, "initial_paths": 3, "policy": "random"}}
    )
    with ToolPool([Search()]) as tools:
        result = evaluate(
            prompts(*questions),
            sampler=sampler,
            tools=tools,
            renderer=renderer,
            config=config,
            mode=mode,
            seed=5,
            **more,
        )
    return result, sampler


def test_means_errors_and_costs(renderer):
    turns = {"a": [CALL, RIGHT], "b": [RIGHT], "c": [CALL, WRONG], "d": [MALFORMED]}
    result, sampler = run(renderer, lambda question, seed, greedy: turns[question], list("abcd"), samples=2)
    assert (result.questions, result.samples) == (4, 2)
    assert result.accuracy == 0.5
    # Question means 1, 1, 0, 0: unbiased variance 1/3 over 4 questions, not over 8 answers.
    assert result.accuracy_se == pytest.approx(math.sqrt(1 / 3 / 4))
    assert result.reward == pytest.approx((1 + 1 + 0 - 1) / 4)
    assert result.format_ok == 0.75
    assert result.tool_calls_per_question == 0.5
    assert result.sampled_tokens == sum(len(s.tokens) for tree in result.trees for s in tree.segments if s.sampled)
    assert len(sampler.requests) == 12
    assert all(tree.policy == "chain" and len(tree.leaves) == 2 for tree in result.trees)
    assert all(leaf.accuracy is not None for tree in result.trees for leaf in tree.leaves)


def test_greedy_asks_for_one_greedy_answer(renderer):
    result, sampler = run(
        renderer, lambda question, seed, greedy: [RIGHT if greedy else WRONG], list("ab"), mode="greedy", samples=4
    )
    assert result.accuracy == 1.0
    assert (result.mode, result.samples) == ("greedy", 1)
    assert len(sampler.requests) == 2
    assert all(request.greedy for request in sampler.requests)


def test_samples_are_drawn_apart_and_a_seed_repeats(renderer):
    def script(question, seed, greedy):
        return [RIGHT if seed % 2 else WRONG]

    first, sampler = run(renderer, script, list("abcdefgh"), samples=4)
    again, _ = run(renderer, script, list("abcdefgh"), samples=4)
    assert len({request.seed for request in sampler.requests}) == 32
    assert 0 < first.accuracy < 1
    assert first == again


def test_progress_counts_answers(renderer):
    ended = []
    run(renderer, lambda *_: [CALL, RIGHT], list("abc"), samples=2, progress=ended.append)
    assert sum(ended) == 6


def test_metric_names(renderer):
    result, _ = run(renderer, lambda *_: [RIGHT], list("ab"))
    values = result.as_metrics("eval/held/sampled")
    assert set(values) == {f"eval/held/sampled/{name}" for name in METRICS}
    assert {"accuracy", "reward", "tool_calls_per_question", "format_ok", "sampled_tokens"} <= set(result.as_metrics())
    assert values["eval/held/sampled/questions"] == 2.0
    assert all(type(value) is float for value in values.values())


def test_one_question_has_no_standard_error():
    tree = RolloutTree("q", "q", ("1",), "chain", 0, (Segment(-1, (1,), False), Segment(0, (2, 3), True)),
                       (Leaf(1, StopReason.EOS, reward=1.0, accuracy=1.0),))  # fmt: skip
    result = summarize([tree], "greedy")
    assert math.isnan(result.accuracy_se)
    assert result.sampled_tokens == 2
    assert "accuracy_se" not in result.as_metrics()


def test_nothing_to_evaluate(renderer):
    with pytest.raises(ValueError, match="got no prompts to evaluate; expected at least one"):
        run(renderer, lambda *_: [RIGHT], [])
    with pytest.raises(ValueError, match="mode is 'beam'; expected 'sampled' or 'greedy'"):
        run(renderer, lambda *_: [RIGHT], ["a"], mode="beam")
