"""Retries after faults that may pass, answers kept on disk, calls recorded and replayed."""

import json
import multiprocessing
import sqlite3
import threading
import time

import pytest

from arpo_ext.config import ToolsConfig
from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.tools import Retry, ToolPool, open_pool
from arpo_ext.tools.cache import AnswerCache
from arpo_ext.tools.records import CallRecords, ReplayTool, read_records
from arpo_ext.types import ToolCall, ToolResult


class FlakyTool:
    """Fails with the given errors in turn, then answers in capitals."""

    name = "echo"
    timeout_s = 5.0
    workers = 2
    identity = "echo 1"

    def __init__(self, *errors, timeout_s=5.0):
        self.errors = list(errors)
        self.runs = []
        self.timeout_s = timeout_s

    def start(self): ...

    def close(self): ...

    def run(self, text):
        self.runs.append(text)
        if self.errors:
            raise self.errors.pop(0)
        return ToolResult(self.name, text.upper(), ok=text != "bad")


def ask(tool, *texts, **options):
    with ToolPool([tool], **options) as pool:
        results = [pool.submit(ToolCall(tool.name, text)).result(timeout=10) for text in texts]
        return results, pool.stats[tool.name]


def test_a_fault_that_may_pass_is_tried_again_with_growing_delays():
    tool = FlakyTool(TransientToolError("busy"), TransientToolError("busy"))
    start = time.monotonic()
    (result,), stats = ask(tool, "hi", retry=Retry(attempts=2, delay_s=0.05))
    assert time.monotonic() - start >= 0.05 + 0.1
    assert (result.text, result.ok) == ("HI", True)
    assert (stats.calls, stats.retries, stats.failures) == (1, 2, 0)
    assert result.seconds >= 0.15


def test_faults_that_stay_become_a_failure_that_counts_the_attempts():
    tool = FlakyTool(*[TransientToolError("no route to host")] * 9)
    (result,), stats = ask(tool, "hi", retry=Retry(attempts=2, delay_s=0.001))
    assert not result.ok
    assert result.text == "the echo tool failed 3 times, last: no route to host"
    assert len(tool.runs) == 3
    assert (stats.retries, stats.failures) == (2, 1)


def test_only_faults_that_may_pass_are_tried_again(caplog):
    tool = FlakyTool(ValueError("defect"))
    (defect, refused), stats = ask(tool, "hi", "bad", retry=Retry(attempts=5, delay_s=0.001))
    assert not defect.ok
    assert not refused.ok
    assert tool.runs == ["hi", "bad"]
    assert (stats.retries, stats.failures) == (0, 2)


def test_retries_end_with_the_calls_timeout():
    tool = FlakyTool(*[TransientToolError("busy")] * 100, timeout_s=0.2)
    start = time.monotonic()
    (result,), _ = ask(tool, "hi", retry=Retry(attempts=99, delay_s=0.15))
    assert time.monotonic() - start < 3
    assert "did not answer within 0.2 s" in result.text
    runs = len(tool.runs)
    time.sleep(0.5)
    assert len(tool.runs) == runs <= 3


def test_good_answers_outlive_the_pool_and_failures_do_not(tmp_path):
    first, second = FlakyTool(), FlakyTool()
    ask(first, "hi", "bad", cache=AnswerCache(tmp_path / "cache"))
    (kept, failed), stats = ask(second, "hi", "bad", cache=AnswerCache(tmp_path / "cache"))
    assert (kept.text, kept.ok, kept.cached) == ("HI", True, True)
    assert (failed.ok, failed.cached) == (False, False)
    assert second.runs == ["bad"]
    assert (stats.calls, stats.cached, stats.failures) == (2, 1, 1)


def test_another_identity_or_none_finds_nothing(tmp_path):
    ask(FlakyTool(), "hi", cache=AnswerCache(tmp_path))
    for identity in ("echo 2", None):
        tool = FlakyTool()
        tool.identity = identity
        (result,), _ = ask(tool, "hi", cache=AnswerCache(tmp_path))
        assert not result.cached
        assert tool.runs == ["hi"]


@pytest.mark.parametrize("text", ["", "\0\x1b", "naïve 日本", "x" * 100_000, "\ud800"])
def test_any_text_is_a_key_and_an_answer(tmp_path, text):
    cache = AnswerCache(tmp_path)
    cache.put("i", ToolCall("t", text), ToolResult("t", "answer", ok=True))
    assert cache.get("i", ToolCall("t", text)).text == "answer"
    assert cache.get("i", ToolCall("t", text + " ")) is None
    cache.put("i", ToolCall("t", "k"), ToolResult("t", text, ok=True))
    assert cache.get("i", ToolCall("t", "k")).text == text


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), sqlite3.OperationalError("readonly database")]
)
def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path, caplog, monkeypatch, fault):
    cache = AnswerCache(tmp_path)

    def broken(*_, **__):
        raise fault

    monkeypatch.setattr(cache._store, "set", broken)
    results, stats = ask(FlakyTool(), "a", "b", cache=cache)
    assert [r.text for r in results] == ["A", "B"]
    assert stats.failures == 0
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert str(fault) in warnings[0]


@pytest.mark.parametrize("damage", ["{", "[1]", "null ", b"\xff", 3])
def test_a_damaged_answer_is_asked_for_again_and_mended(tmp_path, caplog, damage):
    cache = AnswerCache(tmp_path)
    ask(FlakyTool(), "a", cache=cache)
    with sqlite3.connect(tmp_path / "cache.db") as base:
        base.execute("UPDATE Cache SET value = ?", (damage,))
    base.close()
    tool = FlakyTool()
    (result,), _ = ask(tool, "a", cache=AnswerCache(tmp_path))
    assert (result.text, result.ok, tool.runs) == ("A", True, ["a"])
    assert AnswerCache(tmp_path).get("echo 1", ToolCall("echo", "a")).text == "A"


def test_a_cache_whose_file_is_overwritten_midway_costs_one_warning(tmp_path, caplog):
    with ToolPool([FlakyTool()], cache=AnswerCache(tmp_path)) as pool:
        assert pool.submit(ToolCall("echo", "a")).result(timeout=10).text == "A"
        for path in tmp_path.glob("cache.db*"):
            path.write_bytes(b"no database" * 10_000)
        assert [pool.submit(ToolCall("echo", text)).result(timeout=10).text for text in "bcd"] == ["B", "C", "D"]
    assert len(caplog.records) == 1
    with pytest.raises(ToolError, match="cannot be opened"):
        AnswerCache(tmp_path)


def test_a_cache_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="file cannot be opened"):
        AnswerCache(tmp_path / "file")


def fill(folder, worker):
    cache = AnswerCache(folder)
    for number in range(50):
        cache.put("i", ToolCall("t", f"{worker} {number}"), ToolResult("t", f"answer {number}", ok=True))


def test_several_processes_share_a_cache(tmp_path):
    workers = [multiprocessing.get_context("spawn").Process(target=fill, args=(tmp_path, w)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    cache = AnswerCache(tmp_path)
    kept = [cache.get("i", ToolCall("t", f"{w} {n}")) for w in range(3) for n in range(50)]
    assert [result.text for result in kept] == [f"answer {n}" for _ in range(3) for n in range(50)]


def test_every_call_is_recorded_and_replayed(tmp_path):
    path = tmp_path / "runs" / "calls.jsonl"
    tool = FlakyTool(TransientToolError("busy"))
    recorded, _ = ask(tool, "hi", "hi", "bad", retry=Retry(delay_s=0.001), records=CallRecords(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["text"], r["result"], r["ok"], r["cached"], r["attempts"]) for r in rows] == [
        ("hi", "HI", True, False, 2),
        ("hi", "HI", True, True, 0),
        ("bad", "BAD", False, False, 1),
    ]
    replay = ReplayTool("echo", read_records(path)["echo"], workers=2)
    replayed, _ = ask(replay, "hi", "hi", "bad", "new")
    assert [(r.text, r.ok, r.cached) for r in replayed[:3]] == [(r.text, r.ok, r.cached) for r in recorded]
    assert replayed[3].text == "no recorded answer of the echo tool to this call"
    assert not replayed[3].ok


def test_a_replayed_call_fails_and_answers_in_the_recorded_order():
    answers = {("q",): [ToolResult("t", "down", ok=False), ToolResult("t", "up", ok=True)]}
    tool = ReplayTool("t", answers, workers=1)
    assert [tool.run("q").text for _ in range(3)] == ["down", "up", "up"]
    tool.start()
    assert tool.run("q").text == "down"


def test_replay_can_take_as_long_as_the_recorded_call():
    tool = ReplayTool("t", {("q",): [ToolResult("t", "x", ok=True, seconds=0.05)]}, workers=1, wait=True)
    start = time.monotonic()
    tool.run("q")
    assert time.monotonic() - start >= 0.05
    assert tool.timeout_s > 0.05


def test_records_on_a_full_disk_cost_one_warning(tmp_path, caplog, monkeypatch):
    records = CallRecords(tmp_path / "calls.jsonl")

    class Full:
        closed = False

        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    records.close()
    monkeypatch.setattr(records, "_file", Full())
    results, _ = ask(FlakyTool(), "a", "b", records=records)
    assert [r.text for r in results] == ["A", "B"]
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_a_record_that_a_full_disk_tore_costs_only_itself(tmp_path, caplog):
    path = tmp_path / "calls.jsonl"
    ask(FlakyTool(), "a", "b", records=CallRecords(path))
    path.write_bytes(path.read_bytes()[:-20])
    ask(FlakyTool(), "c", records=CallRecords(path))
    assert {asked: results[0].text for asked, results in read_records(path)["echo"].items()} == {
        ("a",): "A",
        ("c",): "C",
    }
    assert "line 2 " in caplog.text


def test_calls_with_different_histories_differ_for_a_tool_that_keeps_state(tmp_path):
    class Stateful(FlakyTool):
        stateful = True

        def run(self, text, history):
            return super().run("".join((*history, text)))

    calls = [ToolCall("echo", "c", history) for history in ((), ("a",), ("a", "b"), ("a",))]
    path = tmp_path / "calls.jsonl"

    def answers(tool, **options):
        with ToolPool([tool], **options) as pool:
            results = [pool.submit(call).result(timeout=10) for call in calls]
        return [(r.text, r.ok, r.cached) for r in results]

    expected = [("C", True, False), ("AC", True, False), ("ABC", True, False), ("AC", True, True)]
    assert answers(Stateful(), records=CallRecords(path), cache=AnswerCache(tmp_path / "cache")) == expected
    kept = answers(Stateful(), cache=AnswerCache(tmp_path / "cache"))
    assert kept == [(text, True, True) for text, _, _ in expected]
    assert answers(ReplayTool("echo", read_records(path)["echo"], workers=1)) == expected
    assert answers(FlakyTool())[1:] == [("C", True, True)] * 3


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "t"}', "3"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "calls.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ToolError, match=r"line 1 .*calls\.jsonl.*expected a recorded call"):
        read_records(path)


def test_a_configuration_records_keeps_and_replays(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"title": "sun", "text": "the sun is a star"}) + "\n")
    settings = {"search": {"corpus": corpus}, "cache": tmp_path / "cache", "records": tmp_path / "calls.jsonl"}
    call = ToolCall("search", "sun")
    for cached in (False, True):
        with open_pool(ToolsConfig(**settings)) as pool:
            result = pool.submit(call).result(timeout=10)
        assert (result.text, result.cached) == ("the sun is a star", cached)
    corpus.write_text(json.dumps({"title": "sun", "text": "the sun is hot"}) + "\n")
    with open_pool(ToolsConfig(**settings)) as pool:
        assert pool.submit(call).result(timeout=10).text == "the sun is hot"
    corpus.unlink()
    config = ToolsConfig(search={"corpus": corpus}, replay=tmp_path / "calls.jsonl")
    assert config.names == ("search",)
    with open_pool(config) as pool:
        assert pool.submit(call).result(timeout=10).text == "the sun is a star"


def test_waiting_for_a_retry_ends_when_the_pool_closes():
    tool = FlakyTool(*[TransientToolError("busy")] * 9)
    pool = ToolPool([tool], retry=Retry(attempts=9, delay_s=60)).__enter__()
    future = pool.submit(ToolCall("echo", "x"))
    while not tool.runs:
        time.sleep(0.01)
    pool.close()
    assert "closed" in future.result(timeout=5).text
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(t.name == "tool-echo" for t in threading.enumerate()):
        time.sleep(0.01)
    assert not any(t.name == "tool-echo" for t in threading.enumerate())
