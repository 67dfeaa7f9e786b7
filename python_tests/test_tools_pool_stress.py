"""The tool pool under random loads: every call is answered, nothing runs twice at once, limits hold."""

import threading
import time
from collections import Counter
from concurrent.futures import wait as wait_for

from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext.errors import TransientToolError
from arpo_ext.tools import Retry, ToolPool
from arpo_ext.types import ToolCall, ToolResult

TIMEOUT_S = 0.03
HANG_S = 0.12
# What a call's first word asks the tool to do.
KINDS = ("answer", "fail", "raise", "once", "always", "hang", "nothing", "slow")


class Tool:
    """Behaves as the call says, counts what runs at once; calls that were given up no longer count."""

    def __init__(self, name, workers):
        self.name, self.workers, self.timeout_s = name, workers, TIMEOUT_S
        self.lock = threading.Lock()
        self.running: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self.faults: list[str] = []

    def start(self): ...

    def close(self): ...

    def abandon(self, text):
        with self.lock:
            self.running[text] -= 1

    def run(self, text):
        with self.lock:
            self.running[text] += 1
            self.runs[text] += 1
            runs = self.runs[text]
        try:
            return self.act(text.split()[0], text, runs)
        finally:
            with self.lock:
                self.running[text] -= 1

    def act(self, kind, text, runs):
        if kind == "raise":
            raise KeyError(text)
        if kind == "always" or (kind == "once" and runs == 1):
            raise TransientToolError("busy")
        if kind == "hang":
            time.sleep(HANG_S)
        if kind == "slow":
            time.sleep(0.004)
        return None if kind == "nothing" else ToolResult(self.name, text.upper(), ok=kind != "fail")


GOOD = {"answer", "once", "slow"}
actions = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "cancel", "pause"]),
        st.sampled_from(["a", "b"]),
        st.sampled_from(KINDS),
        st.integers(0, 2),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions=actions, workers=st.integers(1, 4), closes_early=st.booleans())
def test_every_call_is_answered_once_whatever_happens(actions, workers, closes_early):
    tools = [Tool("a", workers), Tool("b", workers)]
    futures, cancelled = [], set()
    with ToolPool(tools, retry=Retry(attempts=2, delay_s=0.001)) as pool:
        for act, name, kind, number in actions:
            if act == "submit":
                call = ToolCall(name, f"{kind} {number}")
                futures.append((call, pool.submit(call)))
            elif act == "cancel" and futures:
                call, future = futures[number % len(futures)]
                if pool.cancel(future):
                    cancelled.add(future)
            else:
                time.sleep(0.002 * number)
        if not closes_early:
            assert not wait_for([future for _, future in futures], timeout=20).not_done
        stats = pool.stats
    results = [(call, future, future.result(timeout=5)) for call, future in futures]
    for call, future, result in results:
        check(call, result, future in cancelled, closes_early)
    assert sum(s.calls for s in stats.values()) == len(futures)
    assert sum(s.cancelled for s in stats.values()) == len(cancelled)
    if not closes_early:
        # Whoever was answered by another's run or answer, and by a run of their own.
        for tool in tools:
            answered = [r for c, f, r in results if c.name == tool.name and f not in cancelled]
            assert stats[tool.name].cached == sum(r.cached for r in answered)
            assert stats[tool.name].failures <= sum(tool.runs.values())


def check(call, result, was_cancelled, closed_early):
    kind = call.text.split()[0]
    assert result.name == call.name
    if was_cancelled:
        assert (result.text, result.ok) == ("cancelled", False)
    elif result.ok:
        assert kind in GOOD
        assert result.text == call.text.upper()
    else:
        reasons = {
            "fail": call.text.upper(),
            "raise": "KeyError",
            "always": "failed 3 times, last: busy",
            "nothing": "expected a ToolResult",
        }
        allowed = ["did not answer within"] + ["pool was closed"] * closed_early
        assert any(text in result.text for text in [reasons.get(kind, "did not answer"), *allowed]), (call, result)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["slow 1", "slow 2", "slow 3", "answer 1", "answer 2"]), min_size=5, max_size=60),
    workers=st.integers(1, 5),
    clients=st.integers(1, 4),
)
def test_concurrency_and_single_flight_under_many_clients(texts, workers, clients):
    tool = Watched("a", workers)
    tool.timeout_s = 20
    with ToolPool([tool]) as pool:

        def client(own):
            for text in own:
                assert pool.submit(ToolCall("a", text)).result(timeout=20).text == text.upper()

        threads = [threading.Thread(target=client, args=(texts[i::clients],)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = pool.stats["a"]
    assert set(tool.runs.values()) <= {1}
    assert tool.most <= workers
    assert (stats.calls, stats.cached, stats.failures) == (len(texts), len(texts) - len(set(texts)), 0)


class Watched(Tool):
    most = 0

    def act(self, kind, text, runs):
        with self.lock:
            self.most = max(self.most, sum(self.running.values()))
        return super().act(kind, text, runs)


def test_many_hanging_calls_hold_nobody_up():
    tool = Tool("a", 4)
    with ToolPool([tool]) as pool:
        futures = [pool.submit(ToolCall("a", f"{'hang' if i % 3 else 'answer'} {i}")) for i in range(120)]
        results = [future.result(timeout=30) for future in futures]
    assert not any(result.ok for i, result in enumerate(results) if i % 3)
    assert sum(result.ok for result in results) >= 20
