"""Rewards: the published scorer with its faults, the strict one without, accuracies, leaves of trees, real answers."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from arpo_ext.config import RewardConfig
from arpo_ext.rewards import RewardResult, hierarchical_reward, score_tree
from arpo_ext.rewards import math_equal as math_module
from arpo_ext.rewards.answer_text import as_number
from arpo_ext.rewards.base import math_or_f1
from arpo_ext.rewards.exact import exact
from arpo_ext.rewards.math_equal import is_mathematical, math_equal
from arpo_ext.rewards.token_f1 import published_token_f1, token_f1
from arpo_ext.types import Leaf, RolloutTree, Segment, StopReason, ToolResult

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def boxed(answer):
    return f"<think>t</think><answer>\\boxed{{{answer}}}</answer>"


def published(response, *answers):
    return hierarchical_reward(response, answers, accuracy="token_f1", rules="published").score


def strict(response, *answers, **settings):
    return hierarchical_reward(response, answers or ("5",), accuracy="exact", **settings)


CALLS = "<search>q</search><result>r</result><python>1</python><result>1</result>"


class TestPublished:
    """What the published scorer was seen to do when it was run."""

    @pytest.mark.parametrize(
        ("prediction", "gold", "score"),
        [
            ("3", "-3", 1.0),
            ("980", "9.80", 1.0),
            ("12", "1/2", 1.0),
            ("(1,2)", "12", 1.0),
            ("\\frac{1}{2}", "1/2", 0.0),
            ("0.5", "1/2", 0.0),
            ("A", "A", 0.0),
            ("25 July 1978", "26 July 1978", 2 / 3),
            ("\\text{Vienna, Austria}", "Vienna, Austria", 0.5),
            ("The Beatles", "beatles", 1.0),
            ("yes", "no", 0.0),
            ("yes", "yes it is", 0.0),
            ("no answer", "yes", 0.0),
        ],
    )
    def test_accuracy(self, prediction, gold, score):
        assert published(boxed(prediction), gold) == pytest.approx(score)
        assert published_token_f1(prediction, gold) == pytest.approx(score)

    @pytest.mark.parametrize(
        ("response", "score"),
        [
            (boxed("5"), 1.0),
            (CALLS + boxed("5"), 1.1),
            (CALLS + boxed("6"), 0.0),
            # The bonus without any tool call.
            ("<think></search></python></think><answer>\\boxed{5}</answer>", 1.1),
            # The order of the blocks does not matter.
            ("<answer>\\boxed{5}</answer><think>t</think>", 1.0),
            # A tool result that holds a tag breaks the form.
            ("<search>q</search><result><answer></result>" + boxed("5"), -1.0),
            ("<think>t</think><answer>\\boxed {5}</answer>", -1.0),
            ("<think>t</think><answer>5</answer>", -1.0),
            ("<think>t</think><answer>\\boxed{5</answer>}", -1.0),
            ("<think>t</think><answer>\\boxed{5} \\boxed {6}</answer>", -1.0),
            ("<think>t</think></answer>\\boxed{5}<answer>", -1.0),
            ("<answer>\\boxed{5}</answer>", -1.0),
            ("<think><think>t</think><answer>\\boxed{5}</answer>", -1.0),
            (boxed("5") + "<answer></answer>", -1.0),
            ("<search>q</search>" + boxed("5"), -1.0),
            ("<search>q<result>r</result></search>" + boxed("5"), -1.0),
            ("<python>1</python><result>1" + boxed("5"), -1.0),
            (CALLS, -1.0),
            ("", -1.0),
            ("<think>t</think><answer>\\boxed{4} or \\boxed{5}</answer>", 1.0),
        ],
    )
    def test_form_and_bonus(self, response, score):
        assert published(response, "5") == pytest.approx(score)

    def test_tools_run_and_sampled_are_ignored(self):
        result = hierarchical_reward(
            CALLS + boxed("5"), ["5"], accuracy="token_f1", rules="published", tools_run=(), sampled=[(0, 1)]
        )
        assert result == RewardResult(1.1, 1.0, True)

    def test_the_best_of_several_answers_counts(self):
        assert published(boxed("the big apple"), "x", "apple", "big apple") == 1.0


class TestStrictForm:
    @pytest.mark.parametrize(
        ("response", "reason"),
        [
            (boxed("5"), ""),
            ("so <think>a</think> and <think>b</think>\n<answer> it is \\[ \\boxed{5} \\] </answer><|end|>", ""),
            ("<think>t</think><answer>\\boxed {5}</answer>", ""),
            (CALLS + boxed("5"), ""),
            ("<think>I need <search>q</search><result>r</result> this</think><answer>\\boxed{5}</answer>", ""),
            ("<think>t</think><python>print('<answer>')</python><answer>\\boxed{5}</answer>", ""),
            ("<search>q</search><result><answer> <think></result>" + boxed("5"), ""),
            ("", "no <answer>"),
            ("<think>t</think>", "no <answer>"),
            ("<think>t</think>\\boxed{5}", "no <answer>"),
            ("<answer>\\boxed{5}</answer>", "before any complete <think>"),
            ("<answer>\\boxed{5}</answer><think>t</think>", "before any complete <think>"),
            (boxed("5") + "<think>more</think>", "<think> follows the answer"),
            (boxed("5") + boxed("5"), "follows the answer"),
            (boxed("5") + "<answer>\\boxed{5}</answer>", "more than one <answer>"),
            (boxed("5") + CALLS, "<search> follows the answer"),
            ("<think>t<answer>\\boxed{5}</answer></think>", "<answer> inside <think>"),
            ("<think>a<think>b</think></think><answer>\\boxed{5}</answer>", "<think> inside <think>"),
            ("<think>t</think><answer><python>1</python>\\boxed{5}</answer>", "<python> inside <answer>"),
            ("<think>t</think><answer>\\boxed{5}", "<answer> is not closed"),
            ("<think>t<answer>\\boxed{5}</answer>", "<answer> inside <think>"),
            ("<think>t</think></search><answer>\\boxed{5}</answer>", "</search> without its <search>"),
            ("<think></search></python></think><answer>\\boxed{5}</answer>", "</search> without"),
            ("<think>t</think><search>q<answer>\\boxed{5}</answer>", "<search> is not closed"),
            ("<think>t</think><answer>5</answer>", "no \\boxed"),
            ("<think>\\boxed{5}</think><answer>5</answer>", "no \\boxed"),
            ("<think>t</think><answer>\\boxed{5</answer>", "no \\boxed"),
            ("<think>t</think><answer>\\boxed{ }</answer>", "is empty"),
        ],
    )
    def test_form(self, response, reason):
        result = strict(response)
        if reason:
            assert (result.score, result.accuracy, result.format_ok) == (-1.0, 0.0, False)
            assert reason in result.reason
        else:
            assert result == RewardResult(1.0, 1.0, True, "")

    def test_only_what_the_model_wrote_counts(self):
        call, result = "<search>q</search>", "<result><answer>\\boxed{4}</answer></think></result>"
        response = call + result + boxed("5")
        spans = [(0, len(call)), (len(call + result), len(response))]
        assert strict(response, sampled=spans).score == 1.0
        forged = strict(response, sampled=[(0, len(response))])
        assert (forged.score, forged.reason) == (-1.0, "the model wrote a <result> itself")
        assert strict(boxed("5"), sampled=[]).reason == "no <answer>"

    def test_an_answer_cannot_come_from_a_tool(self):
        first, second = "<think>t</think><python>1</python>", " fine"
        response = first + f"<result>{boxed('5')}</result>" + second
        spans = [(0, len(first)), (len(response) - len(second), len(response))]
        assert strict(response, sampled=spans).score == -1.0

    def test_bonus_only_for_tools_that_ran(self):
        response = CALLS + boxed("5")
        assert strict(response).score == 1.0
        assert strict(response, tools_run=["search"]).score == 1.0
        assert strict(response, tools_run=["search", "python"]).score == pytest.approx(1.1)
        assert strict(response, "6", tools_run={"search", "python"}).score == 0.0
        assert strict("<answer>", tools_run={"search", "python"}).score == -1.0

    def test_other_tools_are_blocks_too(self):
        response = "<think>t</think><browse><answer></browse>" + "<answer>\\boxed{5}</answer>"
        assert strict(response, tools_run=["browse"]).score == 1.0
        assert strict(response).score == -1.0

    def test_the_last_box_counts(self):
        assert strict("<think>t</think><answer>\\boxed{4}, no: \\boxed{5}</answer>").score == 1.0
        assert strict("<think>t</think><answer>\\boxed{\\frac{1}{\\{2\\}}}</answer>", "\\frac{1}{\\{2\\}}").score == 1.0


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((boxed("5"), []), {}, "answers is"),
        ((boxed("5"), "5"), {}, "answers is '5'"),
        ((boxed("5"), ["5"]), {"rules": "loose"}, "rules='loose'"),
        ((boxed("5"), ["5"]), {"accuracy": "f1"}, "accuracy='f1'"),
        ((boxed("5"), ["5"]), {"sampled": [(0, 999)]}, r"\(0, 999\)"),
        ((boxed("5"), ["5"]), {"sampled": [(3, 5), (4, 6)]}, r"\(4, 6\)"),
    ],
)
def test_callers_mistakes(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        hierarchical_reward(*arguments, **settings)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("3", "-3", 0),
        ("980", "9.80", 0),
        ("12", "1/2", 0),
        ("(1,2)", "12", 0),
        ("44", ".44", 0),
        ("A", "A", 1),
        ("the", "The", 1),
        ("25 July 1978", "26 July 1978", 0),
        ("July 1978", "26 July 1978", 0.8),
        ("26 July 1978 (aged 40)", "26 July 1978", 0.75),
        ("\\text{Vienna, Austria}", "Vienna, Austria", 1),
        ("$Vienna$", "Vienna", 1),
        ("Vienna", "Vienna, Austria", 2 / 3),
        ("The U.S. Navy", "US navy", 1),
        ("Jean-Paul O'Neil", "Jean Paul ONeil", 0.4),
        ("4000 acre", "4000-acre", 1),
        ("37500 people", "37,500 people", 1),
        ("47.0 km", "47 km", 1),
        ("(born 1985)", "born 1985", 1),
        ("yes", "no", 0),
        ("yes, it is", "yes", 0),
        ("Yes.", "yes", 1),
        ("東京", "東京", 1),
        ("", "Vienna", 0),
        ("...", "Vienna", 0),
    ],
)
def test_strict_token_f1(prediction, gold, score):
    assert token_f1(prediction, gold) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("47", "47.0", 1),
        ("94/2", "47", 1),
        ("\\frac{1}{2}", "0.5", 1),
        ("1,234", "1234", 1),
        ("\\$1,234.50", "1234.5", 1),
        ("90^\\circ", "90°", 1),
        (" Paris. ", "paris", 1),
        ("\\text{Paris}", "Paris", 1),
        ("\\boxed{C}", "The answer is \\(\\boxed{C}\\)", 1),
        ("47", "-47", 0),
        ("47", "48", 0),
        ("1 2", "12", 0),
        ("12,34", "1234", 0),
        ("Paris", "London", 0),
        ("1/0", "0", 0),
        ("", "0", 0),
    ],
)
def test_exact(prediction, gold, score):
    assert exact(prediction, gold) == score


def test_numbers_of_absurd_length_are_not_read():
    assert as_number("9" * 10_000) is None
    assert as_number("1" + "0" * 40) == 10**40


@pytest.mark.parametrize(
    "gold",
    [
        "47",
        "-3",
        "9.80",
        "1,234",
        "1/2",
        "\\frac{1}{2}",
        "2\\sqrt{3}",
        "x^2 + 1",
        "(1, 2]",
        "\\{1, 2\\}",
        "45\\%",
        "\\$30",
        "90^\\circ",
        "AC = 390",
        "\\ln 700",
        "\\cos x",
        "864 \\mbox{ inches}^2",
        "\\pi",
        "\\frac{2ab}{a+b}",
        "6\\text{ cm}",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    ],
)
def test_mathematical_answers(gold):
    assert is_mathematical(gold)


@pytest.mark.parametrize(
    "gold",
    [
        "Vienna, Austria",
        "25 July 1978",
        "C",
        "yes",
        "no",
        "4.7 million",
        "75th",
        "2400 km",
        "2010-12",
        "2010–12",
        "2:1",
        "US",
        "2001-05-04",
        "1/2/2003",
        "4000-acre",
        "\\text{(B)}",
        "\\text{even}",
        "13 seasons.",
        "",
        "1}^na_i",
        "Let x = the sum",
    ],
)
def test_answers_that_are_words(gold):
    assert not is_mathematical(gold)


def test_quick_comparisons_need_no_library(monkeypatch):
    monkeypatch.setattr(math_module.importlib.util, "find_spec", lambda name: None)
    assert math_equal("47.0", "47")
    assert math_equal("1/3", "0.333333")
    assert math_equal("\\sqrt{2}", "$\\sqrt{2}$")
    assert not math_equal("48", "47")
    assert not math_equal("10000001", "10000000")
    assert not math_equal("", "47")


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(math_module, "_worker", math_module._Worker())
    monkeypatch.setattr(math_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"arpo-ext\[rewards\]"):
        math_equal("\\sqrt{4} + 17", "\\sqrt{5}")


def test_the_package_imports_without_the_library():
    code = "import sys; sys.modules.update(math_verify=None, bm25s=None); import arpo_ext.rewards, arpo_ext.tools"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).resolve().parents[1])


class TestMathVerify:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("math_verify", reason="math-verify is not installed (extra: rewards)")

    @pytest.mark.parametrize(
        ("prediction", "gold", "equal"),
        [
            ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt 2}", True),
            ("9\\sqrt{3} - 1395", "-1395 + 9\\sqrt{3}", True),
            ("0.45", "45\\%", True),
            ("x = 5", "5", True),
            ("5 apples", "5", True),
            ("\\frac{√6}{2}", "\\frac{\\sqrt{6}}{2}", True),
            ("10\\sqrt{2}°", "10\\sqrt{2}^\\circ", True),
            ("1, 2", "\\{2, 1\\}", True),
            ("(x+1)^2", "x^2 + 2x + 1", True),
            ("3", "-3", False),
            ("(1,2)", "12", False),
            ("(1,2)", "[1,2]", False),
            ("1 2 3 4 5", "5", False),
            ("4 or 5", "5", False),
            ("it is 5 or maybe 6", "5", False),
            ("x^2", "x^3", False),
            ("nonsense }{", "\\pi", False),
        ],
    )
    def test_equality(self, prediction, gold, equal):
        assert math_equal(prediction, gold) is equal

    def test_math_or_f1_chooses_by_the_accepted_answer(self):
        assert math_or_f1("\\frac{2}{4}", "0.5") == 1.0
        assert math_or_f1("3", "-3") == 0.0
        assert math_or_f1("13 November", "13 November 1993") == pytest.approx(0.8)
        assert hierarchical_reward(boxed("2^{-1}"), ["Vienna", "\\frac12"]).score == 1.0

    def test_a_comparison_without_end_counts_as_unequal_and_the_next_one_works(self, monkeypatch):
        monkeypatch.setattr(math_module, "_LIMIT_S", 3)
        worker = math_module._Worker()
        try:
            start = time.monotonic()
            assert not worker.compare("9^{9^{9^9}}", "\\sqrt{7}")
            assert time.monotonic() - start < 20
            assert worker.compare("\\sqrt{28}/2", "\\sqrt{7}")
        finally:
            worker.close()

    def test_threads(self):
        answers = []
        jobs = [threading.Thread(target=lambda i=i: answers.append(math_equal(f"x+{i}", f"{i}+x"))) for i in range(8)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert answers == [True] * 8


def test_a_comparison_that_no_alarm_stops_ends_with_its_process(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text(
        "LatexExtractionConfig = parse = lambda *args, **settings: args[:1]\n"
        "def verify(gold, prediction, timeout_seconds):\n"
        "    print('not an answer')\n"
        "    while 'endless' in prediction[0]: pass\n"
        "    return True\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(math_module, "_LIMIT_S", 1)
    monkeypatch.setattr(math_module.importlib.util, "find_spec", lambda name: True)
    worker = math_module._Worker()
    try:
        for prediction, equal in (("short", True), ("endless", False), ("short", True)):
            assert worker.compare(prediction, "gold") is equal
    finally:
        worker.close()


def tree_of(*texts, results=()):
    """One path: sampled texts with tool results between them."""
    segments = [Segment(-1, (0,), False, "the question \\boxed{5} <answer>")]
    for index, text in enumerate(texts):
        segments.append(Segment(len(segments) - 1, (1,), True, text, stop_reason=StopReason.TOOL))
        if index < len(results):
            tool = results[index]
            segments.append(Segment(len(segments) - 1, (2,), False, f"<result>{tool.text}</result>", tool=tool))
    return RolloutTree("p", "q", ("5",), "paper", 0, tuple(segments), (Leaf(len(segments) - 1, StopReason.EOS),))


class TestScoreTree:
    CALLS = (
        "<think>a</think><search>q</search>",
        "<python>2+3</python>",
        "<think>b</think><answer>\\boxed{5}</answer>",
    )

    def test_tools_that_ran_earn_the_bonus(self):
        good = ToolResult("search", "<answer>\\boxed{4}</answer>", True), ToolResult("python", "5", True)
        (leaf,) = score_tree(tree_of(*self.CALLS, results=good), RewardConfig()).leaves
        assert (leaf.reward, leaf.accuracy) == (pytest.approx(1.1), 1.0)
        failed = good[0], replace(good[1], ok=False)
        (leaf,) = score_tree(tree_of(*self.CALLS, results=failed), RewardConfig()).leaves
        assert leaf.reward == 1.0

    def test_every_leaf_gets_its_own_path(self):
        tree = tree_of(*self.CALLS[:1], results=[ToolResult("search", "r", True)])
        ends = (boxed("5"), boxed("6"), "no form", "<result>r</result>" + boxed("5"))
        segments = tree.segments + tuple(Segment(2, (3,), True, text, stop_reason=StopReason.EOS) for text in ends)
        leaves = tuple(Leaf(3 + index, StopReason.EOS) for index in range(len(ends)))
        scored = score_tree(replace(tree, segments=segments, leaves=leaves), RewardConfig(accuracy="exact"))
        assert [leaf.reward for leaf in scored.leaves] == [1.0, 0.0, -1.0, -1.0]
        assert [leaf.accuracy for leaf in scored.leaves] == [1.0, 0.0, 0.0, 0.0]
        assert scored.segments == segments

    def test_the_rules_of_the_configuration_are_used(self):
        tree = tree_of("<answer>\\boxed{05}</answer><think>t</think>")
        config = RewardConfig(rules="published", accuracy="exact")
        assert score_tree(tree, config).leaves[0].reward == 1.0
        assert score_tree(tree, RewardConfig()).leaves[0].reward == -1.0


@pytest.mark.parametrize("name", ["train_10k", "valid"])
@pytest.mark.parametrize("accuracy", ["math_or_f1", "token_f1", "exact"])
def test_every_real_answer_equals_itself(name, accuracy):
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra: train)")
    golds = [
        row["ground_truth"] for row in parquet.read_table(path, columns=["reward_model"])["reward_model"].to_pylist()
    ]
    # Six of the 10,000 cannot stand in a box: one is blank, five close a brace they did not open.
    fit = [gold for gold in golds if gold.strip() and not gold.startswith(("1}^", "0}^"))]
    assert len(golds) - len(fit) == (6 if name == "train_10k" else 0)
    failed = [gold for gold in fit if hierarchical_reward(boxed(gold), [gold], accuracy=accuracy).score != 1.0]
    assert failed == []
