"""Write the embedded task: `python -m examples.lookup_and_compute.build --out DIR --seed S`.

DIR gets corpus.jsonl (documents for the search tool), train.jsonl and the held-out sets heldout.jsonl, entities.jsonl,
numbers.jsonl (prompts), demos_1.jsonl and demos_2.jsonl (the two stages of the cold start) and model/ (an untrained
model with its tokenizer). Everything is a function of the seed; a few seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from examples.lookup_and_compute.demonstrations import STAGES, demonstrations
from examples.lookup_and_compute.model import save_model
from examples.lookup_and_compute.tokenizer import make_tokenizer
from examples.lookup_and_compute.world import Split, make_world

PROMPTS: dict[Split, int] = {"train": 1000, "heldout": 200, "entities": 100, "numbers": 100}
DEMONSTRATIONS = (12_800, 2_880)  # 400 steps of 32 and 90 steps of 32: none is seen twice


def build(directory: Path, seed: int) -> None:
    """Write all files of the task under `directory`, which is created if need be."""
    world, tokenizer = make_world(seed), make_tokenizer()

    def render_prompt(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "corpus.jsonl", world.documents())
    for split, count in PROMPTS.items():
        rows = (
            {"id": f"{split}-{number}-{q.kind}-{q.wording}", "question": q.text, "answer": str(q.answer)}
            for number, q in enumerate(world.questions(split, count))
        )
        _write(directory / f"{split}.jsonl", rows)
    for stage, (habits, count) in enumerate(zip(STAGES, DEMONSTRATIONS, strict=True), start=1):
        rows = demonstrations(world, habits, count, render_prompt, stream=str(stage))
        _write(directory / f"demos_{stage}.jsonl", rows)
    save_model(directory / "model", tokenizer, seed)


def _write(path: Path, rows: Iterable[Mapping]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lookup_and_compute/data"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.out, arguments.seed)
    print(f"task: {arguments.out}")


if __name__ == "__main__":
    main()
