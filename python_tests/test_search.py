"""Search over a local corpus: forms of corpora, ranking, ties, and what a bad corpus or query gives."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arpo_ext.config import SearchToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.tools.search import SearchTool
from arpo_ext.tools.search_bm25 import read_corpus

pytest.importorskip("bm25s", reason="bm25s is not installed (extra: search)")

CACHE = Path(__file__).resolve().parents[2] / "shared" / "data" / "search_cache.json"

WORLD = [
    {"title": f"{attribute} of {name}", "text": f"{name} : {attribute} {value} , {other} {value + 30}"}
    for name, value in (("bornak", 12), ("velmir", 47), ("tasmo", 33))
    for attribute, other in (("mass", "age"), ("age", "mass"))
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def started(corpus, **settings):
    tool = SearchTool(SearchToolConfig(corpus=corpus, **settings))
    tool.start()
    return tool


@pytest.fixture
def world(tmp_path):
    return write_rows(tmp_path / "world.jsonl", WORLD)


def test_the_document_whose_title_matches_is_returned_exactly(world):
    tool = started(world, top_k=1)
    for row in WORLD:
        result = tool.run(f" {row['title']}")
        assert result.ok
        assert result.text == row["text"]


def test_a_title_with_the_very_words_wins_over_more_matches(tmp_path):
    rows = [{"title": "x", "text": "mass of bornak mass of bornak"}, {"title": "Mass of Bornak", "text": "12"}]
    tool = started(write_rows(tmp_path / "c.jsonl", rows), top_k=2)
    assert tool.run("mass of bornak").text == "12\nmass of bornak mass of bornak"


def test_hits_are_joined_by_newlines_in_order_of_score(world):
    lines = started(world, top_k=3).run("bornak age").text.split("\n")
    assert len(lines) == 3
    assert lines[0] == "bornak : age 12 , mass 42"
    assert lines[1] == "bornak : mass 12 , age 42"


def test_equal_scores_keep_the_order_of_the_corpus(tmp_path):
    rows = [{"text": f"same words {i}"} for i in range(50)]
    tool = started(write_rows(tmp_path / "c.jsonl", rows), top_k=7)
    assert tool.run("words").text.split("\n") == [f"same words {i}" for i in range(7)]


def test_ties_below_better_hits_keep_the_order_of_the_corpus(tmp_path):
    rows = [{"text": f"word {'best' if i % 3 == 2 else 'good'} {i}"} for i in range(600)]
    hits = started(write_rows(tmp_path / "c.jsonl", rows), top_k=300).run("word best").text.split("\n")
    best = [row["text"] for row in rows if "best" in row["text"]]
    assert hits == best + [row["text"] for row in rows if "good" in row["text"]][:100]


def test_fewer_documents_than_top_k(tmp_path):
    assert started(write_rows(tmp_path / "c.jsonl", [{"text": "one"}]), top_k=5).run("one").text == "one"


def test_long_texts_are_cut(tmp_path):
    tool = started(write_rows(tmp_path / "c.jsonl", [{"text": "word " * 100}]), snippet_chars=20)
    text = tool.run("word").text
    assert len(text) == 20
    assert text.endswith("…")


def test_no_hit_is_an_answer_and_no_query_is_a_failure(world):
    tool = started(world)
    nothing = tool.run("zebra")
    assert (nothing.ok, nothing.text) == (True, "no results")
    for query in ("", "  \n", "?!"):
        empty = tool.run(query)
        assert not empty.ok
        assert "empty" in empty.text


def test_part_of_a_query_may_be_unknown(world):
    assert started(world, top_k=1).run("the zebra velmir").text.startswith("velmir")


def test_unicode_and_text_without_spaces(tmp_path):
    rows = [{"text": "東京タワーの高さは333メートル"}, {"text": "Straße nach Zürich"}]
    tool = started(write_rows(tmp_path / "c.jsonl", rows), top_k=1)
    assert tool.run("東京タワー").text == rows[0]["text"]
    assert tool.run("STRASSE zürich").text == rows[1]["text"]


def test_line_separators_inside_a_text(tmp_path):
    rows = [{"text": "first\u2028second\x85third"}]
    assert started(write_rows(tmp_path / "c.jsonl", rows)).run("second").text == rows[0]["text"]


def test_map_from_query_to_text(tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({"capital of France": "Paris", "rivers": [{"page": 1, "text": "Seine"}, ["Loire"]]}))
    tool = started(path, top_k=1)
    assert tool.run("capital of France").text == "Paris"
    assert tool.run("rivers").text == "1\nSeine\nLoire"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", "", "empty"),
        ("c.json", "{}", "empty"),
        ("c.jsonl", '{"text": "a"}\n{"title": "b"}\n', "line 2"),
        ("c.jsonl", '["text"]\n', "line 1"),
        ("c.jsonl", '{"text": "a", "title": 3}\n', "title"),
        ("c.jsonl", "{text}\n", "not JSON"),
        ("c.json", '["a"]', "expected a map"),
        ("c.json", "{", "not JSON"),
        ("c.txt", "a", "expected .jsonl, .json or .parquet"),
        ("c.jsonl", '{"text": "..."}\n', "no word"),
    ],
)
def test_a_corpus_of_another_form_is_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ToolError, match=message) as caught:
        started(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_corpus(tmp_path):
    with pytest.raises(ToolError, match="cannot be read"):
        started(tmp_path / "none.jsonl")
    with pytest.raises(ToolError, match="no corpus"):
        started(None)


def test_a_missing_library_names_the_extra(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ToolError, match=r"arpo-ext\[search\]"):
        started(world)


def test_threads_get_the_same_answers(world):
    tool = started(world, top_k=2)
    queries = [row["title"] for row in WORLD] * 30
    alone = [tool.run(q).text for q in queries]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda q: tool.run(q).text, queries)) == alone


@pytest.mark.skipif(not CACHE.exists(), reason=f"{CACHE} is absent")
def test_real_queries_find_their_own_result():
    tool = started(CACHE, top_k=1, snippet_chars=100_000)
    documents = read_corpus(CACHE)
    found = sum(tool.run(d.title).text == d.text for d in documents)
    assert found == len(documents)


def rows_of(documents):
    return [(document.title, document.text) for document in documents]


def test_a_parquet_corpus_reads_like_json_lines(tmp_path, world):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(WORLD), tmp_path / "c.parquet")
    assert rows_of(read_corpus(tmp_path / "c.parquet")) == rows_of(read_corpus(world))
    (tmp_path / "broken.parquet").write_text("text")
    with pytest.raises(ToolError, match=r"broken\.parquet cannot be read"):
        read_corpus(tmp_path / "broken.parquet")


QUERIES = ["mass of bornak", "bornak age", "tasmo", "47", "nothing here", "age mass"]


def test_a_mapped_index_answers_as_the_one_in_memory(tmp_path):
    rows = [*WORLD, {"title": "line\nend", "text": "a\u2028b\n日本 caf\u00e9"}, {"text": "untitled bornak"}]
    corpus = write_rows(tmp_path / "c.jsonl", rows)
    memory, mapped = started(corpus, top_k=4), started(corpus, top_k=4, index=tmp_path / "index")
    for query in [*QUERIES, "日本", "line end"]:
        assert mapped.run(query) == memory.run(query)


def test_an_index_is_built_once_per_state_of_the_corpus(tmp_path, world, monkeypatch):
    index = tmp_path / "index"
    before = started(world, index=index, top_k=1)
    text = before.run("mass of tasmo").text
    made = (index / "documents.jsonl").stat().st_mtime_ns
    monkeypatch.setattr("arpo_ext.tools.search_bm25.read_corpus", lambda path: pytest.fail("read again"))
    assert started(world, index=index, top_k=1).run("mass of tasmo").text == text
    assert (index / "documents.jsonl").stat().st_mtime_ns == made
    monkeypatch.undo()
    write_rows(world, [{"title": "mass of tasmo", "text": "changed"}])
    assert started(world, index=index, top_k=1).run("mass of tasmo").text == "changed"
    # Whoever had the old index mapped still has it.
    assert before.run("mass of tasmo").text == text


def test_an_index_in_use_by_several_threads(tmp_path, world):
    tool = started(world, index=tmp_path / "index", top_k=3)
    expected = {query: tool.run(query) for query in QUERIES}
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(tool.run, QUERIES * 100))
    assert answers == [expected[query] for query in QUERIES * 100]


def test_an_index_never_replaces_other_files(tmp_path, world):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ToolError, match="holds other files"):
        started(world, index=tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_half_an_index_is_built_again(tmp_path, world):
    index = tmp_path / "index"
    started(world, index=index)
    (index / "arpo_ext_index.json").write_text("{")
    assert started(world, index=index, top_k=1).run("mass of tasmo").text == "tasmo : mass 33 , age 63"


@pytest.mark.parametrize("name", ["documents.jsonl", "document_offsets.npy", "title_hashes.npy", "data.csc.index.npy"])
@pytest.mark.parametrize("length", [0, 10, None])
def test_an_index_that_a_crash_cut_off_is_built_again(tmp_path, world, name, length):
    index = tmp_path / "index"
    started(world, index=index)
    content = (index / name).read_bytes()
    (index / name).unlink() if length is None else (index / name).write_bytes(content[:length])
    assert started(world, index=index, top_k=1).run("mass of tasmo").text == "tasmo : mass 33 , age 63"
    assert (index / name).read_bytes() == content


def test_several_processes_may_build_one_index(tmp_path, world):
    with ThreadPoolExecutor(6) as threads:
        tools = list(threads.map(lambda _: started(world, index=tmp_path / "index", top_k=1), range(6)))
    assert {tool.run("mass of tasmo").text for tool in tools} == {"tasmo : mass 33 , age 63"}
    assert not list(tmp_path.glob(".index.*"))
