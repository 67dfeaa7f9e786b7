"""The tool pool: concurrency, enforced timeouts, single flight, and that it always answers."""

import threading
import time

import pytest

from arpo_ext.errors import ToolError
from arpo_ext.tools import ToolPool, ToolStats
from arpo_ext.types import ToolCall, ToolResult


class ScriptedTool:
    """Answers with `answer(text)`, and records what happened to it."""

    def __init__(self, name="echo", answer=lambda text: text, *, workers=2, timeout_s=5.0, start_error=None):
        self.name, self.workers, self.timeout_s = name, workers, timeout_s
        self._answer, self._start_error = answer, start_error
        self.runs = []
        self.at_once = self.most_at_once = 0
        self.started = self.closed = 0
        self._lock = threading.Lock()

    def start(self):
        if self._start_error:
            raise self._start_error
        self.started += 1

    def run(self, text):
        with self._lock:
            self.runs.append(text)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            answer = self._answer(text)
        finally:
            with self._lock:
                self.at_once -= 1
        return answer if isinstance(answer, ToolResult) else ToolResult(self.name, answer, ok=True)

    def close(self):
        self.closed += 1


def wait(future):
    return future.result(timeout=10)


def test_answers_a_call_and_measures_it():
    tool = ScriptedTool(answer=lambda text: time.sleep(0.02) or text.upper())
    with ToolPool([tool]) as pool:
        result = wait(pool.submit(ToolCall("echo", "hi")))
    assert (result.name, result.text, result.ok, result.cached) == ("echo", "HI", True, False)
    assert 0.02 <= result.seconds < 2


def test_unknown_tool_names_the_known_ones():
    with ToolPool([ScriptedTool("search"), ScriptedTool("python")]) as pool:
        result = wait(pool.submit(ToolCall("browse", "x")))
    assert not result.ok
    assert "browse" in result.text
    assert "search, python" in result.text


def test_concurrency_is_the_tools_workers():
    barrier = threading.Barrier(3)
    tool = ScriptedTool(answer=lambda text: str(barrier.wait(timeout=5)), workers=3)
    with ToolPool([tool]) as pool:
        futures = [pool.submit(ToolCall("echo", str(i))) for i in range(9)]
        assert all(wait(f).ok for f in futures)
    assert tool.most_at_once == 3


def test_tools_do_not_wait_for_each_other():
    release = threading.Event()
    slow = ScriptedTool("slow", lambda text: str(release.wait(5)), workers=1)
    with ToolPool([slow, ScriptedTool("fast")]) as pool:
        waiting = pool.submit(ToolCall("slow", "x"))
        assert wait(pool.submit(ToolCall("fast", "x"))).ok
        assert not waiting.done()
        release.set()
        assert wait(waiting).ok


def test_equal_calls_run_once_while_the_first_is_running():
    release = threading.Event()
    tool = ScriptedTool(answer=lambda text: release.wait(5) and text)
    with ToolPool([tool]) as pool:
        futures = [pool.submit(ToolCall("echo", "same")) for _ in range(5)]
        release.set()
        results = [wait(f) for f in futures]
        stats = pool.stats["echo"]
    assert tool.runs == ["same"]
    assert [r.cached for r in results] == [False, True, True, True, True]
    assert {r.text for r in results} == {"same"}
    assert [r.seconds for r in results[1:]] == [0.0] * 4
    assert (stats.calls, stats.cached, stats.failures) == (5, 4, 0)
    assert stats.seconds == results[0].seconds > 0


def test_answers_are_kept_and_failures_are_not():
    answers = iter(["not yet", "now"])

    def answer(text):
        word = next(answers)
        return ToolResult("echo", word, ok=word == "now")

    tool = ScriptedTool(answer=answer)
    with ToolPool([tool]) as pool:
        texts = [wait(pool.submit(ToolCall("echo", "q"))) for _ in range(3)]
        assert pool.stats["echo"].failures == 1
    assert [(r.text, r.ok, r.cached) for r in texts] == [
        ("not yet", False, False),
        ("now", True, False),
        ("now", True, True),
    ]


def test_a_failure_is_shared_by_those_who_wait_for_it():
    release = threading.Event()
    tool = ScriptedTool(answer=lambda text: release.wait(5) and ToolResult("echo", "no", ok=False))
    with ToolPool([tool]) as pool:
        futures = [pool.submit(ToolCall("echo", "q")) for _ in range(3)]
        release.set()
        assert [wait(f).ok for f in futures] == [False] * 3
    assert len(tool.runs) == 1


def test_timeout_is_enforced_and_the_lane_keeps_its_width():
    stuck = threading.Event()
    tool = ScriptedTool(answer=lambda text: stuck.wait(20) and text if text == "stuck" else text, workers=1)
    tool.timeout_s = 0.1
    start = time.monotonic()
    with ToolPool([tool]) as pool:
        slow = pool.submit(ToolCall("echo", "stuck"))
        after = pool.submit(ToolCall("echo", "next"))
        assert wait(after).text == "next"
        result = wait(slow)
    assert time.monotonic() - start < 5
    assert not result.ok
    assert "0.1 s" in result.text
    assert result.seconds >= 0.1
    stuck.set()


def test_a_late_answer_changes_nothing():
    release = threading.Event()
    tool = ScriptedTool(answer=lambda text: release.wait(5) and text, timeout_s=0.05)
    with ToolPool([tool]) as pool:
        assert not wait(pool.submit(ToolCall("echo", "q"))).ok
        release.set()
        time.sleep(0.05)
        assert wait(pool.submit(ToolCall("echo", "q"))).ok
        assert pool.stats["echo"].failures == 1


def test_what_a_tool_raises_becomes_an_answer(caplog):
    def answer(text):
        raise KeyError("lost")

    with ToolPool([ScriptedTool(answer=answer, workers=1)]) as pool:
        for _ in range(3):
            result = wait(pool.submit(ToolCall("echo", "q")))
            assert not result.ok
            assert "KeyError: 'lost'" in result.text
    assert "Traceback" in caplog.text


def test_a_tool_that_answers_with_nothing_becomes_an_answer_too():
    tool = ScriptedTool()
    tool.run = lambda text: None
    with ToolPool([tool]) as pool:
        for _ in range(3):
            result = pool.submit(ToolCall("echo", "x")).result(timeout=5)
            assert not result.ok
            assert "TypeError" in result.text


def test_a_tool_that_cannot_start_closes_the_others():
    good, bad = ScriptedTool("good"), ScriptedTool("bad", start_error=ToolError("no corpus"))
    with pytest.raises(ToolError, match="no corpus"), ToolPool([good, bad]):
        pass
    assert good.started == good.closed == 1


def test_close_answers_what_waits_and_never_hangs():
    stuck = threading.Event()
    tool = ScriptedTool(answer=lambda text: str(stuck.wait(20)), workers=1)
    start = time.monotonic()
    with ToolPool([tool]) as pool:
        futures = [pool.submit(ToolCall("echo", str(i))) for i in range(3)]
        while not tool.runs:
            time.sleep(0.001)
    assert [wait(f).ok for f in futures] == [False] * 3
    assert time.monotonic() - start < 5
    assert tool.closed == 1
    stuck.set()


def test_only_an_open_pool_takes_calls():
    pool = ToolPool([ScriptedTool()])
    with pytest.raises(ToolError, match="not open"):
        pool.submit(ToolCall("echo", "x"))
    with pool:
        pass
    with pytest.raises(ToolError, match="not open"):
        pool.submit(ToolCall("echo", "x"))


def test_names_must_differ():
    with pytest.raises(ValueError, match="every name once"):
        ToolPool([ScriptedTool(), ScriptedTool()])


def test_a_pool_without_tools_answers_too():
    with ToolPool([]) as pool:
        assert not wait(pool.submit(ToolCall("search", "x"))).ok
        assert pool.stats == {}


def test_many_calls_from_many_threads():
    tool = ScriptedTool(workers=4)
    with ToolPool([tool]) as pool:
        results = []

        def client(offset):
            results.extend(wait(pool.submit(ToolCall("echo", str((i + offset) % 50)))) for i in range(200))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = pool.stats["echo"]
    assert len(results) == 800
    assert all(r.ok for r in results)
    assert sorted(tool.runs, key=int) == [str(i) for i in range(50)]
    assert stats == ToolStats(calls=800, failures=0, cached=750, seconds=stats.seconds)


def test_a_cancelled_call_that_has_not_begun_is_left_out():
    release = threading.Event()
    tool = ScriptedTool(answer=lambda text: release.wait(5) and text, workers=1)
    with ToolPool([tool]) as pool:
        first = pool.submit(ToolCall("echo", "first"))
        second = pool.submit(ToolCall("echo", "second"))
        assert second.cancel()
        assert (second.result(0).text, second.result(0).ok) == ("cancelled", False)
        assert not second.cancel()
        release.set()
        assert wait(first).ok
        assert wait(pool.submit(ToolCall("echo", "third"))).ok
        assert pool.stats["echo"] == ToolStats(calls=3, cancelled=1, seconds=pool.stats["echo"].seconds)
    assert tool.runs == ["first", "third"]


def test_a_cancelled_call_that_runs_gives_its_worker_back():
    stuck = threading.Event()
    tool = ScriptedTool(answer=lambda text: stuck.wait(20) and text if text == "stuck" else text, workers=1)
    abandoned = []
    tool.abandon = abandoned.append
    start = time.monotonic()
    with ToolPool([tool]) as pool:
        slow = pool.submit(ToolCall("echo", "stuck"))
        while not tool.runs:
            time.sleep(0.001)
        assert pool.cancel(slow)
        assert slow.result(0).text == "cancelled"
        assert wait(pool.submit(ToolCall("echo", "next"))).ok
        again = pool.submit(ToolCall("echo", "stuck"))
        stuck.set()
        assert wait(again).ok
    assert abandoned == ["stuck"]
    assert tool.runs == ["stuck", "next", "stuck"]
    assert time.monotonic() - start < 10


def test_who_shares_a_call_keeps_it_when_another_cancels():
    release = threading.Event()
    tool = ScriptedTool(answer=lambda text: release.wait(5) and text)
    with ToolPool([tool]) as pool:
        futures = [pool.submit(ToolCall("echo", "same")) for _ in range(3)]
        assert pool.cancel(futures[0])
        release.set()
        results = [wait(future) for future in futures]
        assert not pool.cancel(futures[1])
    assert [(r.text, r.ok, r.cached) for r in results] == [
        ("cancelled", False, False),
        ("same", True, False),
        ("same", True, True),
    ]
    assert tool.runs == ["same"]


def test_a_timeout_abandons_the_call():
    stuck = threading.Event()
    tool = ScriptedTool(answer=lambda text: str(stuck.wait(20)), timeout_s=0.05)
    abandoned = []
    tool.abandon = lambda text: abandoned.append(text) or 1 / 0
    with ToolPool([tool]) as pool:
        assert "did not answer" in wait(pool.submit(ToolCall("echo", "q"))).text
        assert "did not answer" in wait(pool.submit(ToolCall("echo", "r"))).text
    assert abandoned == ["q", "r"]
    stuck.set()


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), MemoryError()])
def test_a_tool_that_wants_to_end_the_program_becomes_an_answer(error):
    def answer(text):
        raise error

    with ToolPool([ScriptedTool(answer=answer, workers=1)]) as pool:
        for _ in range(3):
            assert type(error).__name__ in wait(pool.submit(ToolCall("echo", "q"))).text


@pytest.mark.parametrize("text", [None, b"bytes", 3])
def test_a_result_without_a_text_becomes_a_failure(text):
    with ToolPool([ScriptedTool(answer=lambda _: ToolResult("echo", text, ok=True))]) as pool:
        result = wait(pool.submit(ToolCall("echo", "q")))
    assert not result.ok
    assert "expected a ToolResult with a text" in result.text


def test_a_text_that_no_tokenizer_takes_is_mended():
    with ToolPool([ScriptedTool(answer=lambda _: "a\ud800b")]) as pool:
        assert wait(pool.submit(ToolCall("echo", "q"))).text == "a?b"


def test_threads_that_the_system_refuses_are_asked_for_again(monkeypatch, caplog):
    stuck = threading.Event()
    tool = ScriptedTool(answer=lambda text: stuck.wait(20) and text if text == "stuck" else text, workers=1)
    tool.timeout_s = 0.05
    refused = []
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "tool-echo" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with ToolPool([tool]) as pool:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        slow = pool.submit(ToolCall("echo", "stuck"))
        assert not wait(slow).ok
        tool.timeout_s = 5.0
        assert wait(pool.submit(ToolCall("echo", "next"))).ok
    assert len(refused) == 1
    assert "gets no thread" in caplog.text
    stuck.set()


def test_answers_kept_in_memory_are_bounded(monkeypatch):
    monkeypatch.setattr("arpo_ext.tools.pool._KEPT_CHARS", 100)
    tool = ScriptedTool(answer=lambda text: text * 40)
    with ToolPool([tool]) as pool:
        for text in "abacb":
            assert wait(pool.submit(ToolCall("echo", text))).ok
        assert pool._answer_chars == 82
    assert tool.runs == ["a", "b", "c", "b"]
