"""The form a response must have, and the boxed answer in it: the published check and a strict one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from arpo_ext.rewards.answer_text import braced, last_boxed

TOOL_TAGS = ("search", "python")


class FormatFault(Exception):
    """The response is not of the required form; the message says what is wrong."""


def published_answer(response: str) -> str:
    """The boxed answer by the rules of the published scorer: tags are counted anywhere in `response`.

    As many `<think>` as `</think>`, at least one; `<answer>` and `</answer>` once; after each `<search>` and each
    `<python>` its closing tag, `<result>` and `</result>`, in this order; `\\boxed{` and `}` in the answer.
    """
    opened, closed = response.count("<think>"), response.count("</think>")
    if opened != closed or opened == 0:
        raise FormatFault(f"{opened} <think> and {closed} </think>; expected as many, at least one")
    for tag in ("<answer>", "</answer>"):
        if response.count(tag) != 1:
            raise FormatFault(f"{tag} occurs {response.count(tag)} times; expected once")
    for tool in TOOL_TAGS:
        start = response.find(f"<{tool}>")
        while start >= 0:
            for tag in (f"</{tool}>", "<result>", "</result>"):
                start = response.find(tag, start)
                if start < 0:
                    raise FormatFault(f"<{tool}> is not followed by {tag}")
            start = response.find(f"<{tool}>", start)
    _, _, rest = response.partition("<answer>")
    answer, close, _ = rest.partition("</answer>")
    if not close:
        raise FormatFault("</answer> stands before <answer>")
    if "\\boxed{" not in answer or "}" not in answer:
        raise FormatFault("the answer holds no \\boxed{...}")
    start = answer.rfind("\\boxed")
    if not answer.startswith("\\boxed{", start):
        raise FormatFault("the last \\boxed is not followed by a brace")
    content = braced(answer, start + len("\\boxed"), escapes=False)
    if content is None:
        raise FormatFault("the brace of \\boxed is not closed")
    return content


def strict_answer(response: str, sampled: Sequence[tuple[int, int]] | None, tools: Collection[str] = ()) -> str:
    """The boxed answer, by rules that a response cannot meet by accident.

    Only what the model wrote (`sampled`) is looked at, so no tool result can break or make the form:

    - blocks `<think>`, `<answer>` and one per tool, each closed before the next opens; a tool call may stand inside
      `<think>`. What is inside a tool call is the tool's affair: tags there are plain text.
    - exactly one `<answer>`, after at least one complete `<think>`; no block after it.
    - `<result>` is not the model's to write. With `sampled=None`, where results cannot be told apart, a result
      block is skipped with all that is in it.
    - the answer holds `\\boxed{...}` with something in it; the last one counts.
    """
    text = response if sampled is None else "".join(_spans(response, sampled))
    answers = 0
    thought = False
    answer = ""
    for tag, content in _blocks(text, {*TOOL_TAGS, *tools}, skip_results=sampled is None):
        if answers:
            raise FormatFault(f"<{tag}> follows the answer" if tag != "answer" else "more than one <answer>")
        if tag == "think":
            thought = True
        elif tag == "answer":
            if not thought:
                raise FormatFault("<answer> comes before any complete <think>")
            answers, answer = 1, content
    if not answers:
        raise FormatFault("no <answer>")
    boxed = last_boxed(answer)
    if boxed is None:
        raise FormatFault("the answer holds no \\boxed{...}")
    if not boxed.strip():
        raise FormatFault("the \\boxed{} of the answer is empty")
    return boxed


def _blocks(text: str, tools: set[str], *, skip_results: bool) -> Iterator[tuple[str, str]]:
    """(tag, content) of every block in the order of their ends; FormatFault if they do not nest as they may."""
    names = "|".join(map(re.escape, sorted({"think", "answer", "result", *tools}, key=len, reverse=True)))
    pattern = re.compile(rf"<(/?)({names})>")
    # Open blocks as (tag, start of its content); only <think> may hold another block.
    open_blocks: list[tuple[str, int]] = []
    position = 0
    while match := pattern.search(text, position):
        closing, tag = bool(match[1]), match[2]
        position = match.end()
        if closing:
            if not open_blocks or open_blocks[-1][0] != tag:
                raise FormatFault(f"</{tag}> without its <{tag}>")
            yield tag, text[open_blocks.pop()[1] : match.start()]
            continue
        inside = open_blocks[-1][0] if open_blocks else None
        if tag == "result" and not skip_results:
            raise FormatFault("the model wrote a <result> itself")
        if inside is not None and (inside != "think" or tag in ("think", "answer")):
            raise FormatFault(f"<{tag}> inside <{inside}>")
        if tag == "result" or tag in tools:
            end = text.find(f"</{tag}>", position)
            if end < 0:
                raise FormatFault(f"<{tag}> is not closed")
            if tag != "result":
                yield tag, text[position:end]
            position = end + len(f"</{tag}>")
        else:
            open_blocks.append((tag, position))
    if open_blocks:
        raise FormatFault(f"<{open_blocks[-1][0]}> is not closed")


def _spans(response: str, sampled: Sequence[tuple[int, int]]) -> Iterator[str]:
    last = 0
    for start, end in sampled:
        if not last <= start <= end <= len(response):
            raise ValueError(
                f"sampled holds the span ({start}, {end}); expected spans in order within 0 to {len(response)}"
            )
        last = end
        yield response[start:end]
