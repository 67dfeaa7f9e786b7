"""Readers of prompts and demonstrations, the writer of rollout trees, and the order in which items are drawn.

Every fault of a file is a `DataError` of one sentence that names the path, what was found and what is expected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arpo_ext.errors import DataError
from arpo_ext.types import Prompt, RolloutTree

PARQUET_COLUMNS = ("data_source", "prompt", "reward_model")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class DemoSegment:
    """A run of a demonstration: either `text` or `tokens`. `train` says whether the model learns to write it."""

    train: bool
    text: str | None = None
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Demo:
    """One demonstration, the prompt included; its segments, concatenated, are what the model sees."""

    segments: tuple[DemoSegment, ...]


def read_prompts(path: str | Path, *, limit: int | None = None, system_prompt: str | None = None) -> list[Prompt]:
    """The prompts of a `.parquet` file with ARPO's columns or of a `.jsonl` file, in file order.

    Parquet: `data_source`, `prompt` (list of {role, content}), `reward_model` ({ground_truth: text or list of texts}).
    JSONL: {"messages": [...] | "question": text | "problem": text, "answer": text, number or list of them,
    "id"?: text or number, "source"?: text}. A worked answer whose last line is `#### N` (GSM8K) counts as N.
    limit: read at most this many rows. system_prompt: put before prompts that have no system message.
    """
    path = Path(path)
    readers = {".parquet": _parquet_prompts, ".jsonl": _jsonl_prompts}
    if path.suffix not in readers:
        raise DataError(f"prompts file {path} ends in {path.suffix!r}; expected {' or '.join(map(repr, readers))}")
    _require_file(path, "prompts file")
    prompts = [_with_system(prompt, system_prompt) for prompt in readers[path.suffix](path, limit)]
    if not prompts:
        raise DataError(f"prompts file {path} is empty; expected at least one prompt")
    ids = {prompt.id for prompt in prompts}
    if len(ids) != len(prompts):
        raise DataError(
            f"prompts file {path} has {len(prompts)} prompts and {len(ids)} different ids; expected one each"
        )
    return prompts


def read_demos(path: str | Path) -> list[Demo]:
    """The demonstrations of a `.jsonl` file of {"segments": [{"text": text | "tokens": [int], "train": bool}]}."""
    path = Path(path)
    _require_file(path, "demonstrations file")
    demos = [_demo(row, f"{path}, line {number}") for number, row in _jsonl_rows(path)]
    if not demos:
        raise DataError(f"demonstrations file {path} is empty; expected at least one demonstration")
    return demos


def append_trees(path: str | Path, trees: Iterable[RolloutTree]) -> None:
    """Append one JSON line per tree. Each line is one write, so a killed process leaves no half of an earlier line."""
    with open(path, "ab", buffering=0) as file:
        for tree in trees:
            file.write(json.dumps(tree.to_json(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def draw_order(count: int, seed: int, position: int, size: int) -> list[int]:
    """Indices into `count` items for draws `position` to `position + size - 1` of an endless seeded order.

    Every epoch is its own permutation of range(count), a function of (seed, epoch) alone, so the position is the whole
    state: a resumed run draws what the uninterrupted one would have drawn.
    """
    epochs = {(position + i) // count for i in range(size)}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [int(orders[(position + i) // count][(position + i) % count]) for i in range(size)]


def _require_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise DataError(f"{what} {path} does not exist; expected a file")


def _with_system(prompt: Prompt, system_prompt: str | None) -> Prompt:
    if system_prompt is None or any(message["role"] == "system" for message in prompt.messages):
        return prompt
    messages = ({"role": "system", "content": system_prompt}, *prompt.messages)
    return Prompt(id=prompt.id, messages=messages, answers=prompt.answers, source=prompt.source)


def _parquet_prompts(path: Path, limit: int | None) -> Iterator[Prompt]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require_columns(PARQUET_COLUMNS, file.schema_arrow.names, f"prompts file {path}")
            # The other columns of published files hold types that differ from file to file.
            table = file.read(columns=list(PARQUET_COLUMNS))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"prompts file {path} is not a parquet file that can be read ({reason})") from None
    for index, row in enumerate(table.slice(0, limit).to_pylist()):
        where = f"{path}, row {index}"
        reward_model = row["reward_model"]
        if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
            found = sorted(reward_model) if isinstance(reward_model, dict) else type(reward_model).__name__
            raise DataError(f"{where}: column 'reward_model' lacks 'ground_truth'; found {found}")
        yield Prompt(
            id=f"{path.stem}-{index}",
            messages=_messages(row["prompt"], where),
            answers=_answers(reward_model["ground_truth"], where),
            source=str(row["data_source"]),
        )


def _jsonl_prompts(path: Path, limit: int | None) -> Iterator[Prompt]:
    for index, (number, row) in enumerate(_jsonl_rows(path)):
        if index == limit:
            return
        where = f"{path}, line {number}"
        content = next((name for name in ("messages", "question", "problem") if name in row), "question")
        _require_columns((content, "answer"), row, where)
        messages = row[content] if content == "messages" else [{"role": "user", "content": row[content]}]
        yield Prompt(
            id=str(row.get("id", f"{path.stem}-{index}")),
            messages=_messages(messages, where),
            answers=_answers(row["answer"], where),
            source=str(row.get("source", path.stem)),
        )


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number} is not JSON ({error.msg}); expected one object a line"
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} holds a {type(row).__name__}; expected an object")
            yield number, row


def _require_columns(expected: Sequence[str], found: Iterable[str], where: str) -> None:
    found = list(found)
    missing = [name for name in expected if name not in found]
    if missing:
        raise DataError(f"{where} lacks {', '.join(map(repr, missing))}; found {', '.join(map(repr, found)) or 'none'}")


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    messages = value if isinstance(value, list) else []
    well_formed = [
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages
    ]
    if not messages or not all(well_formed):
        raise DataError(f"{where}: the prompt is {_shown(value)}; expected a list of {{role, content}} messages")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _answers(value: Any, where: str) -> tuple[str, ...]:
    answers = value if isinstance(value, list) else [value]
    plain = [isinstance(a, str | int | float) and not isinstance(a, bool) for a in answers]
    if not answers or not all(plain):
        raise DataError(f"{where}: the answer is {_shown(value)}; expected a text, a number or a list of them")
    return tuple(_final_answer(str(a)) for a in answers)


def _final_answer(answer: str) -> str:
    last_line = answer.rstrip().rpartition("\n")[2]
    return last_line.removeprefix("#### ").strip() if last_line.startswith("#### ") else answer


def _demo(row: Mapping[str, Any], where: str) -> Demo:
    _require_columns(("segments",), row, where)
    if not isinstance(row["segments"], list):
        raise DataError(f"{where}: 'segments' is {_shown(row['segments'])}; expected a list")
    demo = Demo(tuple(_demo_segment(s, f"{where}, segment {i}") for i, s in enumerate(row["segments"])))
    if not any(segment.train for segment in demo.segments):
        raise DataError(f"{where}: no segment has train=true; expected at least one that the model learns")
    return demo


def _demo_segment(value: Any, where: str) -> DemoSegment:
    keys = set(value) if isinstance(value, dict) else set()
    if keys not in ({"text", "train"}, {"tokens", "train"}):
        raise DataError(f"{where} is {_shown(value)}; expected {{text, train}} or {{tokens, train}}")
    if not isinstance(value["train"], bool):
        raise DataError(f"{where}: 'train' is {_shown(value['train'])}; expected true or false")
    text, tokens = value.get("text"), value.get("tokens")
    if "text" in keys:
        if not isinstance(text, str):
            raise DataError(f"{where}: 'text' is {_shown(text)}; expected a text")
        return DemoSegment(train=value["train"], text=text)
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise DataError(f"{where}: 'tokens' is {_shown(tokens)}; expected a list of token ids")
    return DemoSegment(train=value["train"], tokens=tuple(tokens))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
