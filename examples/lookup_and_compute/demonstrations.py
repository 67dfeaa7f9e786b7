"""Imperfect demonstrations for the cold start, in two stages.

A demonstration is a question, what a demonstrator did and what the tools answered at that time: the world had other
values then, so none can be learned by heart. Demonstrators know how to use the tools, but take shortcuts:

- S and P: answer by heart, without any tool;
- M: stop after the first search (with its value, or with a guess), now and then answer by heart.

Stage 1 shows every skill and few shortcuts. Stage 2 is short and ties shortcuts to the wording: carefully worded
questions are mostly answered properly, questions that begin with "quick:" mostly by a shortcut. After it the model
still has every skill, its most likely answer is the shortcut wherever a question says "quick:", and a proper answer
there has a probability of about a fifth: enough for reinforcement learning to find it. The share of quick questions
(world.QUICK_SHARE) therefore sets the accuracy before reinforcement learning, greedy as well as sampled.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from examples.lookup_and_compute.tokenizer import END, THOUGHTS
from examples.lookup_and_compute.world import ATTRIBUTES, OPERATORS, Fact, Kind, Question, Wording, World


@dataclass(frozen=True)
class Habits:
    """What demonstrators do wrong, as probabilities, and `kinds`, the share of each kind of question.

    shortcut: by wording, of taking a shortcut at all. by_heart: that the shortcut of an M question is an answer without
    tools. Slips happen beside any shortcut: wrong_attribute per search; misread (the number nobody asked for),
    wrong_operator and malformed (an answer without its box) per demonstration.
    """

    kinds: Mapping[Kind, float]
    shortcut: Mapping[Wording, float]
    by_heart: float = 0.1
    wrong_attribute: float = 0.03
    misread: float = 0.04
    wrong_operator: float = 0.04
    malformed: float = 0.02


# Stage 1 shows more sums than will be asked: they are short and teach the copying of digits, which every kind needs.
STAGES = (
    Habits(kinds={"S": 0.25, "P": 0.35, "M": 0.40}, shortcut={"careful": 0.2, "quick": 0.2}),
    Habits(kinds={"S": 0.35, "P": 0.20, "M": 0.45}, shortcut={"careful": 0.1, "quick": 0.78}),
)


def demonstrations(
    world: World, habits: Habits, count: int, render_prompt: Callable[[str], str], stream: str
) -> Iterator[dict[str, list]]:
    """`count` rows `{"segments": [{"text", "train"}, ...]}`: the prompt, then turns of the model and tool results.

    `render_prompt` maps a question's text to the prompt's text; `stream` names the random stream. Only turns of the
    model are trained. No number of the second world occurs in any row.
    """
    rng = random.Random(f"{world.seed}/demonstrations/{stream}")
    while count > 0:
        question = world.sample(rng, habits.kinds)
        turns = list(demonstrate(question, world, habits, rng))
        if any(int(number) in world.unseen_numbers for text, _ in turns for number in re.findall(r"\d+", text)):
            continue
        prompt = {"text": render_prompt(question.text), "train": False}
        yield {"segments": [prompt, *({"text": text, "train": train} for text, train in turns)]}
        count -= 1


def demonstrate(question: Question, world: World, habits: Habits, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """(text, written by the model) of each turn and each tool result after the prompt."""
    box = "{}" if rng.random() < habits.malformed else r"\boxed{{{}}}"
    shortcut = rng.random() < habits.shortcut[question.wording]
    if shortcut and (question.kind != "M" or rng.random() < habits.by_heart):
        yield _answer("guess", _guess(world, rng), box)
        return
    if question.kind == "P":
        code = question.code
    else:
        found = [_search_for(fact, world, habits, rng) for fact in question.operands]
        yield _call("search", "search", found[0].query)
        yield _result(found[0].text)
        if question.kind == "S":
            misread = rng.random() < habits.misread
            yield _answer("answer", found[0].distractor_value if misread else found[0].value, box)
            return
        if shortcut:
            yield _answer("stop_early", rng.choice((found[0].value, _guess(world, rng))), box)
            return
        yield _call("search_again", "search", found[1].query)
        yield _result(found[1].text)
        code = f"{found[0].value}{question.operator}{found[1].value}"
    if rng.random() < habits.wrong_operator:
        code = re.sub(r"\D", rng.choice(list(OPERATORS)), code)
    left, operator, right = re.fullmatch(r"(\d+)(\D)(\d+)", code).groups()
    value = OPERATORS[operator](int(left), int(right))
    yield _call("compute", "python", f"print({code})")
    yield _result(str(value))
    yield _answer("answer", value, box)


def _search_for(fact: Fact, world: World, habits: Habits, rng: random.Random) -> Fact:
    if rng.random() >= habits.wrong_attribute:
        return fact
    return world.at_another_time(world.facts[fact.entity, rng.choice(ATTRIBUTES)], rng)


def _guess(world: World, rng: random.Random) -> int:
    return rng.choice(world.seen_numbers)


def _call(thought: str, tool: str, text: str) -> tuple[str, bool]:
    return f"<think>{THOUGHTS[thought]}</think><{tool}>{text}</{tool}>", True


def _result(text: str) -> tuple[str, bool]:
    return f"<result>{text}</result>", False


def _answer(thought: str, value: int, box: str) -> tuple[str, bool]:
    return f"<think>{THOUGHTS[thought]}</think><answer>{box.format(value)}</answer>{END}", True
