"""Readers of prompts and demonstrations: every accepted form, and one sentence for every fault."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arpo_ext.data import DemoSegment, append_trees, draw_order, read_demos, read_prompts
from arpo_ext.errors import DataError
from arpo_ext.types import RolloutTree, Segment

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
USER = [{"role": "user", "content": "how many?"}]


def _jsonl(tmp_path: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _parquet(tmp_path: Path, rows: list[dict[str, object]]) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(("name", "rows"), [("train_10k", 10_000), ("hard_search_1k", 1_071), ("valid", 180)])
def test_published_parquet_files_read(name, rows):
    path = SHARED / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{name}.parquet is not beside this checkout (../shared/data)")
    prompts = read_prompts(path, system_prompt="unused: these have one")
    assert len(prompts) == rows
    assert [message["role"] for message in prompts[0].messages] == ["system", "user"]
    assert all(prompt.answers and all(prompt.answers) for prompt in prompts)


def test_published_benchmark_files_read():
    paths = sorted((SHARED / "benchmarks").glob("*.jsonl"))
    if not paths:
        pytest.skip("benchmarks/*.jsonl are not beside this checkout (../shared/data)")
    for path in paths:
        assert len(read_prompts(path, limit=5)) == 5
    assert read_prompts(SHARED / "benchmarks" / "gsm8k.jsonl", limit=1)[0].answers == ("18",)


def test_parquet_ground_truth_is_text_or_list(tmp_path):
    rows = [{"data_source": "s", "prompt": USER, "reward_model": {"ground_truth": ["a", "b"]}}]
    (prompt,) = read_prompts(_parquet(tmp_path, rows))
    assert (prompt.id, prompt.answers, prompt.source) == ("rows-0", ("a", "b"), "s")
    rows[0]["reward_model"] = {"ground_truth": "a"}
    assert read_prompts(_parquet(tmp_path, rows))[0].answers == ("a",)


def test_jsonl_forms_limit_and_system_prompt(tmp_path):
    with_system = [{"role": "system", "content": "own"}, *USER]
    path = _jsonl(
        tmp_path,
        {"question": "one?", "answer": "1"},
        {"id": 7, "messages": with_system, "answer": [2, "two"], "source": "set"},
        {"problem": "three?", "answer": 3.5},
        {"question": "never read", "answer": {}},
    )
    prompts = read_prompts(path, limit=3, system_prompt="be brief")
    assert [p.id for p in prompts] == ["rows-0", "7", "rows-2"]
    assert [p.answers for p in prompts] == [("1",), ("2", "two"), ("3.5",)]
    assert [p.messages[0]["content"] for p in prompts] == ["be brief", "own", "be brief"]
    assert prompts[0].messages[1] == {"role": "user", "content": "one?"}
    assert prompts[1].source == "set"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "x", "answer": "1"}, "line 1 lacks 'question'; found 'prompt', 'answer'"),
        ({"question": "x"}, "line 1 lacks 'answer'; found 'question'"),
        ({"question": 3, "answer": "1"}, "expected a list of {role, content} messages"),
        ({"messages": [], "answer": "1"}, "the prompt is []; expected a list of {role, content} messages"),
        ({"messages": [{"role": "robot", "content": "x"}], "answer": "1"}, "expected a list of {role, content}"),
        ({"question": "x", "answer": None}, "the answer is None; expected a text, a number or a list of them"),
        ({"question": "x", "answer": []}, "the answer is []; expected a text, a number or a list of them"),
        (["x"], "line 1 holds a list; expected an object"),
    ],
)
def test_faulty_jsonl_rows(tmp_path, row, sentence):
    with pytest.raises(DataError) as error:
        read_prompts(_jsonl(tmp_path, row))
    assert sentence in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_faulty_files(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist; expected a file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"ends in '.csv'; expected '.parquet' or '.jsonl'"):
        read_prompts(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="is empty; expected at least one prompt"):
        read_prompts(_jsonl(tmp_path))
    with pytest.raises(DataError, match="2 prompts and 1 different ids"):
        read_prompts(_jsonl(tmp_path, *[{"id": 1, "question": "x", "answer": "y"}] * 2))
    (tmp_path / "rows.jsonl").write_text("{oops\n")
    with pytest.raises(DataError, match=r"line 1 is not JSON .* expected one object a line"):
        read_prompts(tmp_path / "rows.jsonl")
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="is not a parquet file that can be read"):
        read_prompts(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="lacks 'prompt', 'reward_model'; found 'data_source', 'question'"):
        read_prompts(_parquet(tmp_path, [{"data_source": "s", "question": "x"}]))
    with pytest.raises(DataError, match=r"row 0: column 'reward_model' lacks 'ground_truth'; found \['style'\]"):
        read_prompts(_parquet(tmp_path, [{"data_source": "s", "prompt": USER, "reward_model": {"style": "rule"}}]))


def test_demos_with_text_and_tokens(tmp_path):
    segments = [{"text": "q", "train": False}, {"tokens": [1, 2], "train": True}]
    (demo,) = read_demos(_jsonl(tmp_path, {"segments": segments}))
    assert demo.segments == (DemoSegment(train=False, text="q"), DemoSegment(train=True, tokens=(1, 2)))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, "lacks 'segments'; found 'text'"),
        ({"segments": "x"}, "'segments' is 'x'; expected a list"),
        ({"segments": [{"text": "x", "train": False}]}, "no segment has train=true"),
        ({"segments": [{"text": "x"}]}, "segment 0 is {'text': 'x'}; expected {text, train} or {tokens, train}"),
        ({"segments": [{"text": "x", "train": 1}]}, "'train' is 1; expected true or false"),
        ({"segments": [{"text": 5, "train": True}]}, "'text' is 5; expected a text"),
        ({"segments": [{"tokens": [1, -1], "train": True}]}, "'tokens' is [1, -1]; expected a list of token ids"),
    ],
)
def test_faulty_demos(tmp_path, row, sentence):
    with pytest.raises(DataError) as error:
        read_demos(_jsonl(tmp_path, row))
    assert sentence in str(error.value)


def test_trees_are_appended_one_a_line(tmp_path):
    tree = RolloutTree("p", "q", ("a",), "chain", 0, (Segment(-1, (1, 2), sampled=False, text="naïve"),))
    append_trees(tmp_path / "trees.jsonl", [tree])
    append_trees(tmp_path / "trees.jsonl", [tree, tree])
    lines = (tmp_path / "trees.jsonl").read_text(encoding="utf-8").splitlines()
    assert [RolloutTree.from_json(json.loads(line)) for line in lines] == [tree] * 3


def test_draw_order_covers_epochs_and_depends_on_the_position_alone():
    whole = draw_order(5, 3, 0, 15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert whole[:5] != whole[5:10]
    assert draw_order(5, 3, 4, 7) == whole[4:11]
    assert draw_order(5, 4, 0, 15) != whole
