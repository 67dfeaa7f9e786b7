"""Between text and tokens: the chat template once per prompt, tool results in, tool calls out.

Model output is never tokenised again: what the sampler returns stays as it is, and only its decoded text is read here.
Tool text comes from outside, so it is encoded with special tokens disabled: a web page that holds "<|im_end|>" or
"</answer>" must not end the turn or the answer.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from arpo_ext.errors import DataError, ModelError
from arpo_ext.types import Prompt, ToolCall

RESULT_OPEN = "<result>"
RESULT_CLOSE = "</result>"
# Tokens that end a turn in common chat formats; generation configs list them beside the tokenizer's own eos token.
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


class Renderer:
    """What a tokenizer and the names of the tools decide together.

    tokenizer: a transformers tokenizer. tool_names: the tags `<name>` ... `</name>` that call a tool.
    max_result_chars: longer tool texts are cut before they are encoded.

    stop_token_ids: closing tags that are single tokens of the vocabulary; stop_strings: those that are not;
    eos_token_ids: tokens that end the model's answer; result_overhead: tokens of an empty result.
    """

    def __init__(self, tokenizer: Any, tool_names: Sequence[str], *, max_result_chars: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.tool_names = tuple(tool_names)
        self.max_result_chars = max_result_chars
        self.eos_token_ids = self._find_eos_token_ids()
        tags = {tag: self._encode(tag) for name in self.tool_names for tag in (f"<{name}>", f"</{name}>")}
        self._single = {tag: ids[0] for tag, ids in tags.items() if len(ids) == 1 and self.decode(ids).strip() == tag}
        self._closing = {self._single[f"</{n}>"]: n for n in self.tool_names if f"</{n}>" in self._single}
        self.stop_token_ids = list(self._closing)
        self.stop_strings = [f"</{n}>" for n in self.tool_names if f"</{n}>" not in self._single]
        self._result_open = self._encode(RESULT_OPEN)
        self._result_close = self._encode(RESULT_CLOSE)
        self.result_overhead = len(self._result_open) + len(self._result_close)
        self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        self._protected = self._find_protected()
        literals = sorted(self._protected.values(), key=len, reverse=True)
        self._literal = re.compile("|".join(re.escape(text) for text in literals)) if literals else None

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt: the chat template with the opening of the model's turn, or the joined contents.

        Without a template the contents are joined by newlines and encoded as the tokenizer encodes a text (with its
        BOS token, without a closing EOS). DataError if nothing is left to sample from.
        """
        messages = [dict(message) for message in prompt.messages]
        if getattr(self.tokenizer, "chat_template", None):
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer.encode("\n".join(message["content"] for message in messages))
            while ids and ids[-1] in self.eos_token_ids:
                ids = ids[:-1]
        if not ids:
            raise DataError(f"prompt {prompt.id!r} has no tokens after tokenisation; expected at least one")
        return list(ids)

    def result_tokens(self, text: str, limit: int | None = None) -> list[int]:
        """`<result>` + text + `</result>` in at most `limit` tokens; the text is cut, the tags never are.

        Lone surrogates, what is left of bytes that are no text, become U+FFFD: tokenizers refuse them. ValueError if
        `limit` is below `result_overhead`.
        """
        if limit is not None and limit < self.result_overhead:
            raise ValueError(f"a result of at most {limit} tokens cannot hold its tags ({self.result_overhead} tokens)")
        if self.max_result_chars is not None:
            text = text[: self.max_result_chars]
        if limit is not None:
            # No token is longer than the longest, so nothing behind this is kept; encoding a megabyte takes seconds.
            text = text[: limit * self._longest_token]
        body = self._encode_foreign(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        if limit is not None:
            body = body[: limit - self.result_overhead]
        return [*self._result_open, *body, *self._result_close]

    def parse_call(self, tokens: Sequence[int]) -> ToolCall | None:
        """The last complete `<name>` ... `</name>` of one sampled segment; None if it is empty or was never opened.

        Indentation common to all lines and surrounding blanks are removed.
        """
        found = self._last_call(tokens)
        if found is None:
            return None
        name, text = found
        text = textwrap.dedent(text).strip()
        return ToolCall(name, text) if text else None

    def closing_name(self, tokens: Sequence[int]) -> str:
        """Name in the last closing tool tag of a sampled segment, "" without one."""
        for token in reversed(tokens):
            if token in self._closing:
                return self._closing[token]
        text = self.decode(tokens)
        ends = {text.rfind(tag): tag[2:-1] for tag in self.stop_strings if tag in text}
        return ends[max(ends)] if ends else ""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens spelt out, nothing cleaned up."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer_text(self, tokens: Sequence[int]) -> str:
        """The text of a sampled segment without the token that ended the turn."""
        end = len(tokens)
        while end and tokens[end - 1] in self.eos_token_ids:
            end -= 1
        return self.decode(tokens[:end])

    def breaks_off(self, tokens: Sequence[int]) -> bool:
        """Whether sampled `tokens` end within a character, or with the beginning of a stop string.

        What is sampled behind them by itself would be decoded, or searched for stop strings, without them.
        """
        longest = max(map(len, self.stop_strings), default=0)
        # A token holds at least one byte, a character at most four.
        text = self.decode(tokens[-max(4, longest) :])
        begun = (stop[:end] for stop in self.stop_strings for end in range(1, len(stop)))
        return text.endswith(("\N{REPLACEMENT CHARACTER}", *begun))

    def _last_call(self, tokens: Sequence[int]) -> tuple[str, str] | None:
        name = self.closing_name(tokens)
        if not name:
            return None
        opening, closing = f"<{name}>", f"</{name}>"
        if opening in self._single and closing in self._single:
            # By token, so that a tag the model spelt out of ordinary tokens stays text.
            tokens = list(tokens)
            close_at = len(tokens) - 1 - tokens[::-1].index(self._single[closing])
            before = tokens[:close_at]
            if self._single[opening] not in before:
                return None
            open_at = close_at - 1 - before[::-1].index(self._single[opening])
            return name, self.decode(tokens[open_at + 1 : close_at])
        head, found, _ = self.decode(tokens).rpartition(closing)
        _, opened, text = head.rpartition(opening)
        return (name, text) if found and opened else None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode_foreign(self, text: str) -> list[int]:
        """Token ids of text from outside, with no special, added or tag token among them."""
        if not text:
            return []
        ids = self._encode_split(text)
        if self._literal is None or not any(token in self._protected for token in ids):
            return ids
        # `split_special_tokens` leaves added tokens that are not special, and vocabularies that list a tag as an
        # ordinary piece, as they were. Broken after its first character, the literal cannot be matched.
        ids, start = [], 0
        for match in self._literal.finditer(text):
            cut = match.start() + 1
            ids += self._encode_split(text[start:cut])
            start = cut
        ids += self._encode_split(text[start:])
        return [token for token in ids if token not in self._protected]

    def _encode_split(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []

    def _find_eos_token_ids(self) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        found = {vocabulary[text] for text in TURN_ENDS if text in vocabulary}
        if self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        if not found:
            raise ModelError("the tokenizer has no eos token; expected one, since it is what ends an answer")
        return sorted(found)

    def _find_protected(self) -> dict[int, str]:
        """Ids that text from outside must not produce, with their spelling. The unknown token is no danger."""
        protected = {token: text for text, token in self.tokenizer.get_added_vocab().items()}
        protected.update(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True))
        protected.update((token, tag) for tag, token in self._single.items())
        for tag, ids in ((RESULT_OPEN, self._result_open), (RESULT_CLOSE, self._result_close)):
            if len(ids) == 1:
                protected[ids[0]] = tag
        for tag in ("<think>", "</think>", "<answer>", "</answer>"):
            ids = self._encode(tag)
            if len(ids) == 1 and self.decode(ids).strip() == tag:
                protected[ids[0]] = tag
        protected.pop(self.tokenizer.unk_token_id, None)
        return protected
