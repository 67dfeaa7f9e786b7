"""Rollouts whose turns are given, and what the branch rule was asked and answered meanwhile; no engine."""

from concurrent.futures import Future
from types import SimpleNamespace

from arpo_ext.rollout import Completion, check_tree, collect
from arpo_ext.rollout.branching import Brancher
from arpo_ext.types import Prompt, StopReason, ToolResult

VOCAB = 113
CALL, ANSWER = "<search>mass of</search>", "<answer>7</answer><eos>"
RESULT = 9  # <result>, which the tool's answer opens with


class RecordedSampler:
    """`turn(request)` gives a text and, alike for all its tokens, the exact entropy and the top logprobs."""

    vocab_size, max_model_len = VOCAB, 4096

    def __init__(self, renderer, turn):
        self.renderer, self.turn, self.open = renderer, turn, []

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
        text, entropy, top = self.turn(request)
        tokens = tuple(self.renderer.tokenizer.encode(text, add_special_tokens=False))
        reason = StopReason.TOOL if text == CALL else StopReason.EOS
        rows = (top[: request.top_logprobs],) * min(len(tokens), request.probe_tokens) if request.top_logprobs else ()
        return Completion(request.id, tokens, (-0.1,) * len(tokens), (entropy,) * len(tokens), reason, rows)

    def abort(self, id):
        pass

    def reset_prefix_cache(self):
        pass


class Tools:
    def submit(self, call):
        future = Future()
        future.set_result(ToolResult(call.name, "7", True))
        return future


def decisions(monkeypatch, renderer, turn, config, *, prompts=1, seed=3, baselines=None):
    """One collect call, its trees checked, and its decisions by (tree, key, turn).

    taken: (window, baseline, children). scores: what the rule computed. trees, metrics: as `collect` gives them.
    """
    taken, scores = {}, {}
    decide = Brancher.decide

    def spy(self, windows, room):
        branches = decide(self, windows, room)
        for window, branch in zip(windows, branches, strict=True):
            place = window.tree, window.key, window.turn
            assert place not in taken
            taken[place] = (window.entropy, window.root, branch.children)
            scores[place] = branch.score
        return branches

    with monkeypatch.context() as patch:
        patch.setattr(Brancher, "decide", spy)
        collected = collect(
            [Prompt(str(i), ({"role": "user", "content": "mass"},), ()) for i in range(prompts)],
            sampler=RecordedSampler(renderer, turn),
            tools=Tools(),
            renderer=renderer,
            config=config,
            seed=seed,
            baselines=baselines,
        )
    for tree in collected.trees:
        check_tree(
            tree, config.paths, 1 if config.policy == "aepo" else config.initial_paths, probe_tokens=config.probe_tokens
        )
    return SimpleNamespace(taken=taken, scores=scores, trees=collected.trees, metrics=collected.metrics)
