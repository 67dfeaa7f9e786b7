"""The tracker: lines are on disk at once, a rewind forgets exactly what a resumed run writes again."""

import json
import math
import sys

import pytest

from arpo_ext.config import TrackingConfig
from arpo_ext.data import append_trees
from arpo_ext.errors import ConfigError
from arpo_ext.tracking import Tracker
from arpo_ext.types import RolloutTree, Segment

QUIET = TrackingConfig(tensorboard=False, progress=False)


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_readable_as_soon_as_it_is_logged(tmp_path):
    with Tracker(tmp_path / "run", QUIET) as tracker:
        tracker.log(1, "train", {"train/loss": 0.5, "train/ratio_max": math.inf, "train/entropy": math.nan})
        (row,) = _rows(tmp_path / "run")
    assert row.pop("time_s") >= 0
    assert row == {"step": 1, "kind": "train", "train/loss": 0.5, "train/ratio_max": None, "train/entropy": None}


def test_unknown_kind_is_refused(tmp_path):
    with (
        Tracker(tmp_path, QUIET) as tracker,
        pytest.raises(ValueError, match="expected one of sft, train, eval, rollout"),
    ):
        tracker.log(1, "test", {})


def test_rewind_keeps_other_kinds_and_earlier_steps(tmp_path):
    with Tracker(tmp_path, QUIET) as tracker:
        tracker.log(9, "sft", {"sft/loss": 1.0})
        for step in (1, 2, 3):
            tracker.log(step, "train", {"train/loss": float(step)})
        tracker.log(3, "eval", {"eval/a": 0.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "kind": "tra')
    tree = RolloutTree("p", "q", ("a",), "chain", 0, (Segment(-1, (1,), sampled=False),))
    trees = [RolloutTree(**{**_fields(tree), "metadata": {"step": step}}) for step in (1, 2, 3)]
    append_trees(tmp_path / "trees.jsonl", trees)

    with Tracker(tmp_path, QUIET) as tracker:
        tracker.rewind(2)
        tracker.log(3, "train", {"train/loss": 30.0})
    rows = _rows(tmp_path)
    assert [(row["kind"], row["step"]) for row in rows] == [("sft", 9), ("train", 1), ("train", 2), ("train", 3)]
    assert rows[-1]["train/loss"] == 30.0
    assert rows[-1]["time_s"] >= rows[-2]["time_s"]
    kept = [json.loads(line)["metadata"]["step"] for line in (tmp_path / "trees.jsonl").read_text().splitlines()]
    assert kept == [1, 2]


def _fields(tree):
    return {name: getattr(tree, name) for name in tree.__slots__}


def test_time_continues_after_a_rewind(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "time_s": 500.0}\n')
    with Tracker(tmp_path, QUIET) as tracker:
        tracker.rewind(1)
        tracker.log(2, "train", {})
    assert 500.0 <= _rows(tmp_path)[-1]["time_s"] < 600.0


def test_tensorboard_events_hold_the_finite_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(tensorboard=True, progress=False)
    with Tracker(tmp_path, config) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, "train", {"train/loss": step / 2, "train/bad": math.nan})
    with Tracker(tmp_path, config) as tracker:
        tracker.rewind(2)
        tracker.log(3, "train", {"train/loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_progress_bar_counts_and_can_be_silent(tmp_path, capsys):
    with Tracker(tmp_path, QUIET) as tracker, tracker.progress(3, "steps") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
    config = TrackingConfig(tensorboard=False, progress=True)
    with Tracker(tmp_path, config) as tracker, tracker.progress(3, "steps", initial=1, leave=True) as bar:
        bar.update(2)
        assert bar.n == 3
    assert "steps: 100%" in capsys.readouterr().err


def test_other_ranks_write_and_show_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    config = TrackingConfig(tensorboard=True, progress=True)
    with Tracker(tmp_path / "run", config) as tracker, tracker.progress(3, "steps") as bar:
        tracker.rewind(0)
        tracker.log(1, "train", {"a": 1.0})
        bar.update()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_rewind_drops_a_line_cut_inside_a_character(tmp_path):
    trees = tmp_path / "trees.jsonl"
    whole = '{"metadata": {"step": 1}, "text": "é"}\n'.encode()
    trees.write_bytes(whole + whole[: whole.index("é".encode()) + 1])
    with Tracker(tmp_path, TrackingConfig(tensorboard=False, progress=False)) as tracker:
        tracker.rewind(1)
    assert trees.read_bytes() == whole


class FakeService:
    """Stands in the place of a tracker's package and keeps what it is told."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_what_is_finite_and_a_continued_folder_its_run(tmp_path, monkeypatch, name):
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)
    config = QUIET.model_copy(update={name: "agents"})
    for step in (1, 2):
        with Tracker(tmp_path / "run", config, {"seed": 3}) as tracker:
            tracker.log(step, "train", {"train/loss": 0.5, "train/entropy": math.nan})
    with Tracker(tmp_path / "elsewhere" / "run", config, {"seed": 3}):
        pass
    assert service.logged == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.5})]
    assert service.finished == 3
    first, again, other = service.started
    assert first == again
    assert first["project"] == "agents"
    assert first["config"] == {"seed": 3}
    assert first["resume"] == "allow"
    identity = "id" if name == "wandb" else "name"
    assert first[identity] != other[identity]


def test_a_service_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"tracking\.wandb is set, but the package is not installed; expected pip inst"
    ):
        Tracker(tmp_path, QUIET.model_copy(update={"wandb": "agents"}))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_only_the_main_rank_starts_a_service(tmp_path, monkeypatch):
    service = FakeService()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setenv("RANK", "1")
    with Tracker(tmp_path, QUIET.model_copy(update={"wandb": "agents"})) as tracker:
        tracker.log(1, "train", {"train/loss": 0.5})
    assert not service.started
    assert not service.logged
