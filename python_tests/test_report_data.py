"""What the report computes: series, the final table, entropy sums, the choice of trees, axes and charts."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from arpo_ext.evaluation.report_axes import nice_step, short, y_axis
from arpo_ext.evaluation.report_charts import MAX_POINTS, Line, line_chart, stacked_chart
from arpo_ext.evaluation.report_data import read_run
from arpo_ext.evaluation.report_plots import entropy_panel
from arpo_ext.evaluation.report_table import eval_rows, final_table, number, totals
from arpo_ext.evaluation.report_trees import (
    POSITIONS,
    add_entropy,
    add_tools,
    early_and_late,
    entropy_sums,
    read_forest,
)
from arpo_ext.evaluation.report_view import BARS, TEXT_CHARS, shade_limit, views
from arpo_ext.types import Leaf, RolloutTree, Segment, StopReason, ToolResult


def write_metrics(folder: Path, *rows: dict) -> Path:
    text = "".join(json.dumps({"kind": "train", "time_s": 0.0, **row}) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_trees(folder: Path, *trees: RolloutTree) -> Path:
    (folder / "trees.jsonl").write_text("".join(json.dumps(t.to_json()) + "\n" for t in trees), encoding="utf-8")
    return folder


def tree(*segments: Segment, step: int | None = 1, prompt_id: str = "q") -> RolloutTree:
    leaves = (Leaf(len(segments) - 1, StopReason.EOS, reward=1.0),)
    metadata = {} if step is None else {"step": step}
    return RolloutTree(prompt_id, "question", ("1",), "paper", 0, segments, leaves, metadata)


def sampled(parent: int, *entropies: float, text: str = "") -> Segment:
    return Segment(parent, tuple(range(len(entropies))), True, text=text, entropies=entropies)


def answer(parent: int, name: str, *, ok: bool = True, cached: bool = False, seconds: float = 0.5) -> Segment:
    return Segment(parent, (1, 2), False, tool=ToolResult(name, "", ok=ok, seconds=seconds, cached=cached))


ROOT = Segment(-1, (1,), False)


def test_series_are_sorted_and_the_later_line_of_a_step_counts(tmp_path):
    write_metrics(tmp_path, {"step": 2, "a": 1.0}, {"step": 1, "a": 5}, {"step": 2, "a": 3.0, "b": True, "c": "text"})
    run = read_run(tmp_path)
    assert set(run.series) == {"a"}
    assert (run.series["a"].steps, run.series["a"].values) == ((1, 2), (5.0, 3.0))
    assert run.total("a") == 8.0
    assert run.total("b") is None


def test_values_that_are_not_finite_are_named(tmp_path):
    write_metrics(tmp_path, {"step": 1, "a": math.nan, "b": 1.0}, {"step": 2, "a": None, "b": math.inf, "c": None})
    run = read_run(tmp_path)
    assert "no finite value at 2 steps, first 1: a" in run.notes
    assert "no finite value at step 2: b, c" in run.notes
    assert run.total("b") == 1.0


def test_final_table_compares_first_and_last_evaluation(tmp_path):
    def row(step, accuracy, tokens, error=None):
        values = {"accuracy": accuracy, "reward": accuracy - 0.5, "sampled_tokens": tokens}
        values |= {} if error is None else {"accuracy_se": error}
        return {"step": step, **{f"eval/held out/greedy/{name}": value for name, value in values.items()}}

    write_metrics(tmp_path, row(0, 0.25, 100, 0.05), row(5, 0.9, 90), row(10, 0.75, 80, 0.04), {"step": 1, "x": 1.0})
    (found,) = eval_rows(read_run(tmp_path))
    assert (found.name, found.mode, found.first_step, found.last_step) == ("held out", "greedy", 0, 10)
    cell = found.cells["accuracy"]
    assert (cell.before, cell.after, cell.before_error, cell.after_error) == (0.25, 0.75, 0.05, 0.04)
    assert found.cells["tool_calls_per_question"].after is None
    header, rule, line = final_table(tmp_path).splitlines()
    assert header.split()[:3] == ["set", "mode", "steps"]
    assert set(rule) == {"-", " "}
    assert "0 -> 10" in line
    assert "0.250 ±0.050 -> 0.750 ±0.040" in line
    assert "-0.250 -> 0.250" in line
    assert "100 -> 80.000" in line
    assert line.index("0.250 ±") == header.index("accuracy")


def test_final_table_of_one_evaluation_and_of_none(tmp_path):
    write_metrics(tmp_path, {"step": 0, "eval/a/sampled/accuracy": 0.5})
    assert final_table(tmp_path).splitlines()[2].split() == ["a", "sampled", "0", "0.500", "-", "-", "-", "-"]
    write_metrics(tmp_path, {"step": 1, "train/seconds": 1.25, "rollout/forks": 3}, {"step": 2, "rollout/forks": 4})
    assert final_table(tmp_path) == "no evaluation in this run\ntraining: 1 step\nforks: 7\ntime of training: 1.2 s"
    assert totals(read_run(tmp_path)) == {"forks": "7", "time of training": "1.2 s"}
    write_metrics(tmp_path, {"step": 0, "rollout/forks": 3, "time_s": 4.25})
    assert final_table(tmp_path).splitlines()[1:] == ["rollout: 1 step", "forks: 3", "wall time: 4.2 s"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (12.0, "12.000"),
        (123.45, "123.5"),
        (4321.6, "4,322"),
        (100.0, "100"),
        (None, "-"),
        (math.nan, "-"),
    ],
)
def test_numbers_in_tables(value, text):
    assert number(value) == text


def test_entropy_is_counted_from_the_prompt_and_from_each_result():
    sums = entropy_sums(
        tree(ROOT, sampled(0, 1.0, 2.0), answer(1, "search"), sampled(2, 3.0, math.nan, 5.0), sampled(2, 7.0))
    )
    assert sums == {
        ("after the prompt", 1): [1.0, 1],
        ("after the prompt", 2): [2.0, 1],
        ("after search", 1): [10.0, 2],
        ("after search", 3): [5.0, 1],
    }


def test_a_fork_inside_a_turn_moves_no_position():
    whole = entropy_sums(tree(ROOT, answer(0, "python"), sampled(1, *map(float, range(30)))))
    split = entropy_sums(
        tree(ROOT, answer(0, "python"), sampled(1, *map(float, range(5))), sampled(2, *map(float, range(5, 30))))
    )
    assert split == whole
    assert whole["elsewhere", 0] == [sum(range(POSITIONS, 30)), 30 - POSITIONS]


def test_early_and_late_are_thirds_of_the_steps(tmp_path):
    trees = [tree(ROOT, sampled(0, float(step)), step=step) for step in (7, 1, 2, 3, 4, 5, 6)]
    forest = read_forest(write_trees(tmp_path, *trees))
    (early, first), (late, last) = early_and_late(forest)
    assert (early, late) == ("early: step 1 to 2", "late: step 6 to 7")
    assert add_entropy(first) == {"after the prompt": {1: (1.5, 2)}}
    assert add_entropy(last) == {"after the prompt": {1: (6.5, 2)}}
    panel, table = entropy_panel(forest)
    assert len(panel.charts) == 2
    assert table.rows == (("after the prompt", ((1.5, 2), (6.5, 2))),)


def test_trees_without_a_step_are_one_phase(tmp_path):
    forest = read_forest(write_trees(tmp_path, tree(ROOT, sampled(0, 1.0), step=None)))
    assert [name for name, _ in early_and_late(forest)] == ["all steps"]
    assert views(forest)[0]["step"] is None


def test_tools_are_counted_once_per_call(tmp_path):
    one = tree(ROOT, sampled(0, 1.0), answer(1, "search", seconds=0.2), answer(1, "python", ok=False))
    two = tree(ROOT, sampled(0, 1.0), answer(1, "search", cached=True))
    tools = add_tools(read_forest(write_trees(tmp_path, one, two)).trees)
    assert list(tools) == ["python", "search"]
    assert (tools["search"].calls, tools["search"].cached, tools["search"].seconds) == (2, 1, [0.2])
    assert (tools["python"].calls, tools["python"].failed) == (1, 1)


def test_viewer_thins_steps_evenly_under_its_limit(tmp_path):
    trees = [tree(ROOT, sampled(0, 1.0), step=step) for step in range(9)]
    forest = read_forest(write_trees(tmp_path, *trees))
    size = len(json.dumps(views(forest)[0]))
    assert [view["step"] for view in views(forest)] == list(range(9))
    assert [view["step"] for view in views(forest, limit_bytes=3 * size + 5)] == [0, 4, 8]
    assert [view["step"] for view in views(forest, limit_bytes=1)] == [0]


def test_viewer_bounds_long_segments(tmp_path):
    long = sampled(0, *([1.0] * 1000 + [2.0]), text="x" * (TEXT_CHARS + 5))
    (view,) = views(read_forest(write_trees(tmp_path, tree(ROOT, long))))
    segment = view["segments"][1]
    assert len(segment["bars"]) <= BARS
    assert segment["per_bar"] == 5
    assert segment["bars"][-1] == 2.0
    assert segment["text"].endswith("x … (5 more characters)")
    assert segment["mean"] == pytest.approx(1002 / 1001, abs=1e-4)
    assert shade_limit([view]) == segment["mean"]


def test_trees_of_one_question_are_told_apart(tmp_path):
    forest = read_forest(write_trees(tmp_path, tree(ROOT), tree(ROOT), tree(ROOT, prompt_id="other")))
    assert [view["label"] for view in views(forest)] == ["q", "q (tree 2)", "other"]


class Shapes(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, tag, part=""):
        return [attributes for name, attributes in self.tags if name == tag and part in attributes.get("class", "")]


def test_line_chart_breaks_at_gaps_and_shows_values():
    line = Line("loss", (1, 2, 3, 5), (0.0, math.nan, 10.0, 5.0), colour=2)
    shapes = Shapes(line_chart("Loss", [line], y_label="nats"))
    (path,) = shapes.of("path")
    assert path["d"].count("M") == 2
    assert path["d"].startswith("M60.0 200.0")
    assert path["d"].endswith("L408.0 105.0")
    assert len(shapes.of("circle")) == 1
    hover = json.loads(shapes.of("svg")[0]["data-hover"])
    assert hover["x"] == [1, 2, 3, 5]
    assert hover["lines"] == [{"name": "loss", "colour": 2, "y": ["0", "nan", "10", "5"]}]


def test_log_chart_leaves_out_what_has_no_logarithm():
    line = Line("gap", (1, 2, 3), (1e-6, 0.0, 1e-4))
    text = line_chart("Gap", [line], y_label="nats", log=True)
    assert "1e-6" in text
    assert Shapes(text).of("path")[0]["d"].count("M") == 2
    assert "No values were logged" in line_chart("Gap", [Line("gap", (1,), (0.0,))], y_label="nats", log=True)


def test_stacked_bars_add_up():
    lines = [Line("a", (1, 2), (1.0, 3.0)), Line("b", (2,), (1.0,), colour=1)]
    bars = Shapes(stacked_chart("Time", lines, y_label="seconds")).of("rect")
    heights = [float(bar["height"]) for bar in bars]
    assert len(bars) == 3
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert float(bars[2]["y"]) + heights[2] == pytest.approx(float(bars[1]["y"]), abs=0.2)


def test_long_series_are_averaged():
    line = Line("x", tuple(range(1000)), (*(float(i % 2) for i in range(999)), 4.0))
    hover = json.loads(Shapes(line_chart("X", [line], y_label="x")).of("svg")[0]["data-hover"])
    assert len(hover["x"]) <= MAX_POINTS
    assert hover["x"][-1] == 999
    assert float(hover["lines"][0]["y"][-1]) == 4.0


@pytest.mark.parametrize(("span", "step"), [(1.0, 0.2), (10.0, 2.0), (11.0, 5.0), (26.0, 10.0), (3e-4, 1e-4)])
def test_ticks_are_round(span, step):
    assert nice_step(span) == pytest.approx(step)


@pytest.mark.parametrize(
    "values", [[3.0], [0.0], [0.0, 3.3], [-2.0, -1.0], [1e-9, 2e-9], [5.0, 5.0 + 1e-13], [-1e6, 1e6]]
)
def test_axis_holds_its_values(values):
    axis = y_axis(values, log=False)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks()) <= 8


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_500_000, "1.5M"),
        (20_000, "20k"),
        (4005, "4005"),
        (0.25, "0.25"),
        (1e-5, "1e-5"),
        (-2.5e-4, "-2.5e-4"),
        (1e-17, "0"),
    ],
)
def test_tick_labels_are_short(value, text):
    assert short(value) == text
