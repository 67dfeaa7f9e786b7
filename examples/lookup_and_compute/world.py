"""A seeded world of named things with numeric attributes, the documents that describe it and the questions about it.

Three kinds of question: `S` needs one search, `P` one Python call, `M` search, search, Python. Every question is
worded carefully ("what is ...?") or hastily ("quick: ...?"). The wording changes neither the answer nor the tools
needed, only the habits that the cold-start demonstrations show (demonstrations.py).

Held out from training, each as a split of its own:

- `heldout`: facts, pairs of facts and pairs of numbers that no training prompt or demonstration asks about;
- `entities`: things that no training prompt or demonstration names;
- `numbers`: a second world of other things, whose twelve values occur nowhere in training.

One corpus holds the documents of both worlds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["S", "P", "M"]
Wording = Literal["careful", "quick"]
Split = Literal["train", "heldout", "entities", "numbers"]

ATTRIBUTES = ("mass", "age", "size", "cost")
# Consonant, vowel, consonant: so no merge of the tokenizer crosses from one syllable into the next.
FIRST_SYLLABLES = (
    *("bor", "kel", "zan", "tiv", "mur", "dag", "fen", "hol", "jix", "lup", "nor"),
    *("pav", "qod", "ras", "sim", "tor", "vek", "wim", "yal", "zub", "gup", "ceb"),
)
SECOND_SYLLABLES = (
    *("nak", "mir", "dov", "lun", "fex", "gal", "hib", "jot", "kur", "pim"),
    *("rud", "sel", "tav", "vok", "wex", "yan", "zor", "bix", "cod", "fam"),
)
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
}
OPENINGS: dict[Wording, str] = {"careful": "what is", "quick": "quick:"}

MAIN_ENTITIES, UNSEEN_ENTITIES, SECOND_WORLD_ENTITIES = 400, 60, 40
VALUES = range(10, 100)
UNSEEN_NUMBERS = 12
HELD_SHARE = 0.2
KIND_SHARES: dict[Kind, float] = {"S": 0.3, "P": 0.2, "M": 0.5}
QUICK_SHARE = 0.6


@dataclass(frozen=True)
class Fact:
    """A value of the world and the document that states it, followed there by a value nobody asked for."""

    entity: str
    attribute: str
    value: int
    distractor: str
    distractor_value: int

    @property
    def query(self) -> str:
        """What to search for; also the title of the document."""
        return f"{self.attribute} of {self.entity}"

    @property
    def text(self) -> str:
        return f"{self.entity}: {self.attribute}={self.value}, {self.distractor}={self.distractor_value}"


@dataclass(frozen=True)
class Question:
    """`operands` are the facts (S: one, M: two) or the numbers (P: two) asked about; S has no operator."""

    kind: Kind
    wording: Wording
    operands: tuple[Fact, ...] | tuple[int, int]
    operator: str = ""

    @property
    def text(self) -> str:
        if self.kind == "P":
            return f"{OPENINGS[self.wording]} {self.code}?"
        return f"{OPENINGS[self.wording]} {f' {self.operator} '.join(f'the {fact.query}' for fact in self.operands)}?"

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(operand.value if isinstance(operand, Fact) else operand for operand in self.operands)

    @property
    def code(self) -> str:
        """The expression that computes the answer of a P or M question."""
        return self.operator.join(str(value) for value in self.values)

    @property
    def answer(self) -> int:
        return OPERATORS[self.operator](*self.values) if self.operator else self.values[0]


@dataclass(frozen=True)
class World:
    """`facts` by (entity, attribute) over both worlds; `entities` by split; what training must not touch."""

    seed: int
    facts: Mapping[tuple[str, str], Fact]
    entities: Mapping[Literal["seen", "unseen", "second"], tuple[str, ...]]
    unseen_numbers: frozenset[int]
    held_facts: frozenset[Fact]

    def documents(self) -> Iterator[dict[str, str]]:
        """Rows of the search corpus: a document per fact, and per entity one that states no value."""
        for fact in self.facts.values():
            yield {"id": f"{fact.entity}-{fact.attribute}", "title": fact.query, "text": fact.text}
        everybody = [entity for group in self.entities.values() for entity in group]
        for entity, neighbour in zip(everybody, everybody[1:] + everybody[:1], strict=True):
            yield {"id": f"{entity}-note", "title": f"note on {entity}", "text": f"{entity}: found near {neighbour}"}

    def questions(self, split: Split, count: int, stream: str = "") -> list[Question]:
        """`count` different questions of `split`, kinds and wordings in their fixed shares, in random order.

        `stream` names the random stream: equal (seed, split, count, stream) give equal questions. `entities` has no
        P questions, since those name nothing.
        """
        rng = random.Random(f"{self.seed}/{split}/{stream}")
        shares = {kind: share for kind, share in KIND_SHARES.items() if not (split == "entities" and kind == "P")}
        found: dict[str, Question] = {}
        for kind, wording in _schedule(shares, count, rng):
            question = self._draw(split, kind, wording, rng)
            while question.text in found:
                question = self._draw(split, kind, wording, rng)
            found[question.text] = question
        questions = list(found.values())
        rng.shuffle(questions)
        return questions

    def sample(self, rng: random.Random, shares: Mapping[Kind, float]) -> Question:
        """One training question for a demonstration, its kind drawn by `shares`, with values of another time."""
        kind = rng.choices(list(shares), weights=list(shares.values()))[0]
        question = self._draw("train", kind, "quick" if rng.random() < QUICK_SHARE else "careful", rng)
        if kind == "P":
            return question
        return replace(question, operands=tuple(self.at_another_time(fact, rng) for fact in question.operands))

    def at_another_time(self, fact: Fact, rng: random.Random) -> Fact:
        """The same document when its two values were others, still different and neither an unseen number."""
        value, distractor_value = rng.sample(self.seen_numbers, 2)
        return replace(fact, value=value, distractor_value=distractor_value)

    @property
    def seen_numbers(self) -> list[int]:
        return sorted(set(VALUES) - self.unseen_numbers)

    def is_held_pair(self, question: Question) -> bool:
        """Whether the two operands, in either order, form a pair that training never asks about."""
        names = sorted(o.query if isinstance(o, Fact) else str(o) for o in question.operands)
        return random.Random(f"{self.seed}/pair/{names}").random() < HELD_SHARE

    def _draw(self, split: Split, kind: Kind, wording: Wording, rng: random.Random) -> Question:
        while True:
            operator = "" if kind == "S" else rng.choice(tuple(OPERATORS))
            question = Question(kind, wording, self._operands(split, kind, rng), operator)
            held = any(operand in self.held_facts for operand in question.operands)
            if kind != "S":
                held = held or self.is_held_pair(question)
            if split == "train" and (held or question.answer in self.unseen_numbers):
                continue
            if split == "heldout" and not held:
                continue
            return question

    def _operands(self, split: Split, kind: Kind, rng: random.Random) -> tuple[Fact, ...] | tuple[int, int]:
        if kind == "P":
            numbers = sorted(self.unseen_numbers) if split == "numbers" else self.seen_numbers
            return rng.choice(numbers), rng.choice(numbers)
        group = {"entities": "unseen", "numbers": "second"}.get(split, "seen")
        names = rng.sample(self.entities[group], 1 if kind == "S" else 2)
        return tuple(self.facts[name, rng.choice(ATTRIBUTES)] for name in names)


def make_world(seed: int) -> World:
    """The world of `seed`: 400 entities of which 60 are unseen in training, and 40 of the second world."""
    rng = random.Random(f"world/{seed}")
    names = [first + second for first in FIRST_SYLLABLES for second in SECOND_SYLLABLES]
    rng.shuffle(names)
    main, second = names[:MAIN_ENTITIES], names[MAIN_ENTITIES : MAIN_ENTITIES + SECOND_WORLD_ENTITIES]
    entities = {"seen": tuple(main[UNSEEN_ENTITIES:]), "unseen": tuple(main[:UNSEEN_ENTITIES]), "second": tuple(second)}
    unseen_numbers = frozenset(rng.sample(VALUES, UNSEEN_NUMBERS))
    facts: dict[tuple[str, str], Fact] = {}
    for group, members in entities.items():
        numbers = sorted(unseen_numbers if group == "second" else set(VALUES) - unseen_numbers)
        for entity in members:
            # Different values within an entity, so that reading the wrong number is always a wrong answer.
            values = dict(zip(ATTRIBUTES, rng.sample(numbers, len(ATTRIBUTES)), strict=True))
            for attribute in ATTRIBUTES:
                distractor = rng.choice([other for other in ATTRIBUTES if other != attribute])
                facts[entity, attribute] = Fact(entity, attribute, values[attribute], distractor, values[distractor])
    askable = [facts[entity, attribute] for entity in entities["seen"] for attribute in ATTRIBUTES]
    held = frozenset(rng.sample(askable, round(HELD_SHARE * len(askable))))
    return World(seed, facts, entities, unseen_numbers, held)


def _schedule(shares: Mapping[Kind, float], count: int, rng: random.Random) -> list[tuple[Kind, Wording]]:
    """(kind, wording) of `count` questions: the shares hold exactly up to rounding, so no split is lucky."""
    cells = {
        (kind, wording): share * part
        for kind, share in shares.items()
        for wording, part in (("careful", 1 - QUICK_SHARE), ("quick", QUICK_SHARE))
    }
    total = sum(cells.values())
    schedule = [cell for cell, share in cells.items() for _ in range(int(count * share / total))]
    while len(schedule) < count:
        schedule.append(rng.choices(list(cells), weights=list(cells.values()))[0])
    return schedule
