"""`arpo-ext rollout` over a scripted engine that fails: what is complete is on disk, a second run does the rest."""

import json
from contextlib import contextmanager

import pytest
from scripted import Pool, ScriptedSampler, random_script

from arpo_ext import cli
from arpo_ext.config import RewardConfig
from arpo_ext.render import Renderer
from arpo_ext.rewards import score_tree
from arpo_ext.rollout import read_trees


class StatedPool(Pool):
    stats: dict = {}  # noqa: RUF012 - nobody counts here


@pytest.fixture
def engine(monkeypatch, tag_tokenizer):
    """Called with the engine steps after which sampling fails (None: never); the samplers it makes."""
    renderer, fail_at, samplers = Renderer(tag_tokenizer, ["search", "python"]), [], []

    @contextmanager
    def start(config):
        sampler = ScriptedSampler(renderer, random_script)
        samplers.append(sampler)

        def fail():
            if fail_at[0] is not None and sampler.steps >= fail_at[0]:
                raise OSError("engine died")

        sampler.before_step = fail
        yield sampler, StatedPool(), renderer

    monkeypatch.setattr(cli, "_engine", start)
    return fail_at, samplers


def test_a_run_whose_engine_fails_is_resumed_with_what_is_missing(engine, tmp_path, capsys):
    fail_at, samplers = engine
    prompts = tmp_path / "prompts.jsonl"
    questions = ["mass" + " of" * i for i in range(6)]
    prompts.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    overrides = [f"data.train={prompts}", "rollout.paths=4", "rollout.initial_paths=2", "rollout.policy=random"]
    overrides += ["tracking.progress=false", "tracking.tensorboard=false", "rollout.max_response_tokens=60"]

    fail_at[:] = [None]
    assert cli.main(["rollout", *overrides, f"output_dir={tmp_path / 'whole'}"]) == 0
    whole = read_trees(tmp_path / "whole" / "trees.jsonl")
    steps = samplers[-1].steps

    output = tmp_path / "run"
    argv = ["rollout", *overrides, f"output_dir={output}", "train.resume=true"]
    kept = 0
    for fail_at[0] in (steps - 20, steps - 8, None):
        capsys.readouterr()
        code = cli.main(argv)
        message = capsys.readouterr().err
        saved = read_trees(output / "trees.jsonl")
        if fail_at[0] is None:
            break
        assert code == 2
        assert message.count("\n") == 1
        assert "of 6 trees complete: OSError: engine died" in message
        assert "train.resume=true goes on with the others" in message
        assert len(saved) >= kept
        kept = len(saved)
    assert code == 0
    assert 0 < kept < 6
    assert sorted(saved, key=str) == sorted(whole, key=str)
    assert [score_tree(tree, RewardConfig()) for tree in saved] == saved
    # Nothing is left to do.
    assert cli.main(argv) == 0
    assert not samplers[-1].seen
    assert read_trees(output / "trees.jsonl") == saved
