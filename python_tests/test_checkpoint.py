"""Checkpoints are whole or ignored, restore every bit of state, and refuse another run."""

import errno
import json
import logging
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from arpo_ext.config import TrainConfig
from arpo_ext.errors import CheckpointError, ConfigError
from arpo_ext.training import checkpoint
from arpo_ext.training.checkpoint_folder import best, check_room, latest, prune
from arpo_ext.training.prepare import prepare

IDENTITY = {"seed": 1}


def parts(*, lr=1e-3, **model):
    accelerator, model, optimizer = prepare(tiny_model(**model), TrainConfig(lr=lr))
    return {"accelerator": accelerator, "model": model, "optimizer": optimizer}


def descend(own, times=3):
    """A few optimiser steps on drawn tokens, so that moments and generators are not at their start."""
    for _ in range(times):
        tokens = torch.randint(5, 30, (2, 6))
        own["model"](input_ids=tokens).logits.square().mean().backward()
        own["optimizer"].step()
        own["optimizer"].zero_grad()


def save(folder, own, step=3, **more):
    state = checkpoint.RunState(step, 10 * step)
    return checkpoint.save(folder, state, IDENTITY, tokenizer=tiny_tokenizer(), **own, **more)


@pytest.mark.parametrize("tied", [True, False])
def test_a_restored_run_goes_on_with_the_same_bits(tmp_path, tied):
    own = parts(tied=tied)
    descend(own)
    random.seed(3), np.random.seed(3)
    np.random.standard_normal()
    path = save(tmp_path, own)
    descend(own)
    expected = (random.random(), np.random.standard_normal(), torch.rand(3).tolist())

    other = parts(seed=9, tied=tied)
    assert latest(tmp_path) == path
    assert checkpoint.load(path, IDENTITY, **other) == checkpoint.RunState(3, 30)
    checkpoint.load_rng(path, other["accelerator"])
    descend(other)
    assert (random.random(), np.random.standard_normal(), torch.rand(3).tolist()) == expected
    for (name, a), b in zip(own["model"].state_dict().items(), other["model"].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_model_folder_inside_is_usable_by_itself(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = parts()
    path = save(tmp_path, own)
    loaded = AutoModelForCausalLM.from_pretrained(path / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), own["model"].parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(path / "model")("a<tool>")["input_ids"] == [5, 3]


def test_a_resumed_run_may_change_the_learning_rate(tmp_path):
    path = save(tmp_path, parts(lr=1e-3))
    other = parts(lr=5e-4)
    checkpoint.load(path, IDENTITY, **other)
    assert [group["lr"] for group in other["optimizer"].param_groups] == [5e-4]


def test_incomplete_checkpoints_are_passed_over_and_named(tmp_path, caplog):
    own = parts()
    good = save(tmp_path, own, step=1)
    for step, damage in ((2, "cut"), (3, "state"), (4, "missing"), (5, "other version")):
        path = save(tmp_path, own, step=step)
        if damage == "cut":
            (path / "optimizer.pt").write_bytes((path / "optimizer.pt").read_bytes()[:100])
        elif damage == "state":
            (path / "state.json").write_text("{")
        elif damage == "missing":
            (path / "model" / "model.safetensors").unlink()
        else:
            row = json.loads((path / "state.json").read_text())
            (path / "state.json").write_text(json.dumps({**row, "version": 0}))
    (tmp_path / "checkpoints" / "step_000009.tmp").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == good
    messages = [record.getMessage() for record in caplog.records]
    reasons = (
        "its writing was cut off",
        "format version 0",
        "model.safetensors is missing",
        "state.json",
        "optimizer.pt",
    )
    assert len(messages) == 5
    for message, reason in zip(messages, reasons, strict=True):
        assert "is incomplete" in message
        assert reason in message


def test_a_save_that_dies_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    own = parts()
    good = save(tmp_path, own, step=1)

    def dies(*arguments, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies)
        with pytest.raises(CheckpointError, match=r"step_000002 could not be written \(disk full\); the run stands at"):
            save(tmp_path, own, step=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert latest(tmp_path) == good
    # The next try does not trip over what was left.
    assert latest(tmp_path) != save(tmp_path, own, step=2) == latest(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


def test_saving_again_replaces(tmp_path):
    own = parts()
    save(tmp_path, own)
    descend(own)
    path = save(tmp_path, own)
    other = parts(seed=4)
    checkpoint.load(path, IDENTITY, **other)
    assert all(torch.equal(a, b) for a, b in zip(own["model"].parameters(), other["model"].parameters(), strict=True))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000003"]


def test_the_final_model_folder_is_replaced_whole(tmp_path):
    own = parts()
    keep = {"accelerator": own["accelerator"], "model": own["model"], "tokenizer": tiny_tokenizer()}
    for _ in range(2):
        checkpoint.save_model(tmp_path / "model", **keep)
        (tmp_path / "model" / "stale").touch()
    checkpoint.save_model(tmp_path / "model", **keep)
    assert not (tmp_path / "model" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_foreign_checkpoints_are_refused(tmp_path):
    own = parts()
    path = save(tmp_path, own)
    with pytest.raises(CheckpointError, match="was made with seed 1; this run has 2"):
        checkpoint.load(path, {"seed": 2}, **own)
    with pytest.raises(
        CheckpointError, match=r"another model \(model.embed_tokens.weight is \[31, 32\], expected \[31, 16\]\)"
    ):
        checkpoint.load(path, IDENTITY, **parts(hidden=16))
    with pytest.raises(CheckpointError, match=r"another model \(it lacks model\.layers\.2"):
        checkpoint.load(path, IDENTITY, **parts(layers=3))
    with pytest.raises(CheckpointError, match=r"another model \(it has model\.layers\.1"):
        checkpoint.load(path, IDENTITY, **parts(layers=1))


def test_generators_of_another_number_of_processes_stay_where_they_are(tmp_path, monkeypatch):
    own = parts()
    path = save(tmp_path, own)
    before = torch.get_rng_state()
    monkeypatch.setattr(type(own["accelerator"]), "num_processes", 4)
    assert not checkpoint.load_rng(path, own["accelerator"])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_optimiser_that_has_not_stepped_stays_so(tmp_path):
    own, other = parts(), parts(seed=9)
    path = save(tmp_path, own)
    checkpoint.load(path, IDENTITY, **other)
    assert not own["optimizer"].state
    assert not other["optimizer"].state


def test_no_checkpoints_is_none(tmp_path):
    assert latest(tmp_path) is None


def test_generators_can_be_those_of_an_earlier_moment(tmp_path):
    own = parts()
    earlier = checkpoint.rng_state()
    expected = (random.random(), np.random.standard_normal(), torch.rand(3).tolist())
    path = save(tmp_path, own, rng=earlier)
    checkpoint.load_rng(path, own["accelerator"])
    assert (random.random(), np.random.standard_normal(), torch.rand(3).tolist()) == expected


def test_every_changed_key_of_the_configuration_is_named(tmp_path, caplog):
    own = parts()
    path = save(tmp_path, own, config={"train": {"lr": 0.1, "steps": 4, "betas": [0.9, 0.95]}, "seed": 1, "gone": 2})
    now = {"train": {"lr": 0.2, "steps": 4, "betas": [0.9, 0.99], "new": True}, "seed": 1}
    with caplog.at_level(logging.WARNING):
        checkpoint.load(path, IDENTITY, config=now, **own)
    assert [record.getMessage() for record in caplog.records] == [
        "step_000003 was made with train.lr=0.1; this run has 0.2",
        "step_000003 was made with train.betas=[0.9, 0.95]; this run has [0.9, 0.99]",
        "step_000003 was made with train.new=None; this run has True",
        "step_000003 was made with gone=2; this run has None",
    ]


def test_the_last_ones_and_the_best_stay(tmp_path):
    own = parts()
    for step, score in ((1, 0.2), (2, 0.7), (3, 0.7), (4, math.nan), (5, 0.1), (6, 0.4)):
        save(tmp_path, own, step=step, metrics={"a": score})
    assert best(tmp_path, "a").name == "step_000003"
    prune(tmp_path, 2, "a")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000003", "step_000005", "step_000006"
    ]  # fmt: skip
    assert best(tmp_path, "a").name == "step_000003"
    prune(tmp_path, 2, "a")
    save(tmp_path, own, step=7, metrics={"a": 0.8})
    prune(tmp_path, 1, "a")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000007"]
    assert best(tmp_path / "nowhere", "a") is None


def test_room_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3.5e9))
    check_room(folder, 10**9, 1)
    with pytest.raises(
        ConfigError, match=r"has 3.5 GB free; expected 4 GB for 4 checkpoints of 1 GB .*keep_checkpoints=2"
    ):
        check_room(folder, 10**9, 2)
    # Those that are there already need no further room.
    save(folder, parts(), step=1)
    check_room(folder, 10**9, 2)


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, fault):
    def refuse(*arguments, **options):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=rf"cannot be written \({os.strerror(fault)}\); expected a writable folder"):
        check_room(tmp_path / "run", 1, 1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        check_room(tmp_path / "file" / "run", 1, 1)
