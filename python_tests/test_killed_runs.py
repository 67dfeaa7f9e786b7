"""A run that is killed again and again ends as one that never was: same weights, same metrics, same trees."""

import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter

import torch
from bandit import run
from tiny import tiny_model

from arpo_ext.training.checkpoint_folder import stored

SETTINGS = {"steps": 12, "save_every": 1, "eval_every": 3, "updates_per_step": 2}
KILLS = 20
MOMENTS = ("collect", "score", "push", "evaluate", "save")


def child(folder, moments, seed):
    """Train, or go on training, and say through `moments` what is about to begin."""
    torch.set_num_threads(1)
    save = torch.save

    def telling(name, call):
        def told(*arguments, **options):
            moments.send(name)
            return call(*arguments, **options)

        return told

    def change(bandit):
        for name in ("collect", "score", "push", "evaluate"):
            setattr(bandit, name, telling(name, getattr(bandit, name)))

    # In the middle of writing a checkpoint, after the weights and before the state.
    torch.save = telling("save", save)
    run(folder, change=change, resume=True, model=tiny_model(seed=seed), **SETTINGS)
    moments.send("done")


class Runs:
    """Starts children from a process that has imported all they need and has done nothing yet."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, folder):
        self.folder = folder

    def start(self, seed=3):
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=child, args=(self.folder, theirs, seed))
        process.start()
        theirs.close()
        return process, ours

    def finish(self, seed=3):
        process, moments = self.start(seed)
        heard = []
        while not heard or heard[-1] != "done":
            heard.append(moments.recv())
        process.join(60)
        assert process.exitcode == 0


def kill_at(process, moments, wanted, delay_s):
    """Kill a while after the moment `wanted` came; what was heard until then. False if the run ended before it came."""
    try:
        while moments.recv() != wanted:
            pass
    except EOFError:
        process.join()
        assert process.exitcode == 0
        return False
    time.sleep(delay_s)
    process.kill()
    process.join()
    return True


def read_untimed(folder):
    timed = ("time_s", "train/seconds", "memory/peak_gib")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_a_run_killed_twenty_times_ends_as_one_that_was_not(tmp_path, monkeypatch):
    # The server finds its imports by the environment alone.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    Runs.context.set_forkserver_preload(
        ["bandit", "transformers.models.qwen2.modeling_qwen2", "torch.utils.checkpoint"]
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Runs(whole).finish()
    rng = random.Random(7)
    runs, at, newest = Runs(killed), Counter(), 0
    while sum(at.values()) < KILLS:
        # Weights that a resumed run must replace, unless nothing was saved yet.
        process, moments = runs.start(seed=8 if newest else 3)
        # Seldom early in a process, so that the run gets on; the first pushes and collects come in its first step.
        wanted = rng.choice(MOMENTS)
        if not kill_at(process, moments, wanted, rng.uniform(0, 0.05)):
            break
        at[wanted] += 1
        checkpoints = list(stored(killed))
        for one in checkpoints:
            assert weights(one.path)
            moments = torch.load(one.path / "optimizer.pt", weights_only=True)
            # None yet where no reward of the first steps differed from another.
            assert not moments or set(moments["state"]) == set(weights(one.path))
        if checkpoints:
            assert checkpoints[0].step >= newest
            newest = checkpoints[0].step
        else:
            assert newest == 0
    runs.finish(seed=8 if newest else 3)
    assert sum(at.values()) == KILLS, f"the run ended after {at}"
    assert set(at) == set(MOMENTS)

    expected, found = weights(whole), weights(killed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_untimed(killed) == read_untimed(whole)
    assert (killed / "trees.jsonl").read_text() == (whole / "trees.jsonl").read_text()
    assert [one.step for one in stored(killed)] == [one.step for one in stored(whole)]
