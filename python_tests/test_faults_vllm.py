"""Collecting on a real engine while tools fail and hang, their workers are killed and the disk takes nothing more."""

import errno
import itertools
import json
import logging
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from arpo_ext.config import EngineConfig, PythonToolConfig, RolloutConfig
from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.render import Renderer
from arpo_ext.rollout import check_tree, collect
from arpo_ext.tools import Retry, ToolPool
from arpo_ext.tools.cache import AnswerCache
from arpo_ext.tools.python_sandbox import PythonTool
from arpo_ext.tools.records import CallRecords, ReplayTool, read_records
from arpo_ext.types import Prompt, StopReason, ToolResult

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("default")]

PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": f"{word} of {word}?"},), ("7",)) for i, word in enumerate("abcdefgh")
]
SETTINGS = {
    "paths": 12,
    "initial_paths": 6,
    "policy": "random",
    "probe_tokens": 4,
    "max_tool_calls": 4,
    "max_response_tokens": 200,
}


class Faults:
    """Three calls in ten go wrong, each in the next of `kinds`."""

    def __init__(self, kinds):
        self.calls, self.kinds = itertools.count(), itertools.cycle(kinds)
        self.lock = threading.Lock()

    def draw(self):
        with self.lock:
            return next(self.kinds) if next(self.calls) % 10 in (1, 4, 7) else None


class Flaky:
    """Answers in capitals."""

    name, workers, timeout_s, identity = "search", 4, 0.6, "flaky 1"

    def __init__(self):
        self.faults = Faults(("raise", "hang", "busy", "fail"))

    def start(self): ...

    def close(self): ...

    def run(self, text):
        fault = self.faults.draw()
        if fault == "raise":
            raise RuntimeError("defect")
        if fault == "busy":
            raise TransientToolError("busy")
        if fault == "hang":
            time.sleep(2)
        return ToolResult(self.name, "no" if fault else text.upper(), ok=not fault)


class SlowPython:
    """Real sandboxed calls that take a while."""

    name = "python"

    def __init__(self):
        self.faults = Faults(("1 / 0", "while True: pass"))
        self.inner = PythonTool(PythonToolConfig(timeout_s=1, workers=4))
        self.workers, self.timeout_s = self.inner.workers, self.inner.timeout_s
        self.start, self.close = self.inner.start, self.inner.close

    def run(self, text):
        return self.inner.run(f"import time; time.sleep(0.2)\n{self.faults.draw() or f'print({text!r})'}")


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search", "python"])


def talker(tokenizer):
    """A tiny model that has learnt to call either tool with two or three letters, or to answer; not too surely."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).float()
    draw = random.Random(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        rows = [tokenizer.encode(spoken(draw), add_special_tokens=False) for _ in range(32)]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        model(input_ids=ids, labels=torch.where(ids > 0, ids, -100)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def spoken(draw):
    letters = "".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 3)))
    calls = [f"<search>{letters}</search>", f"<python>{letters}</python>"]
    turn = draw.choice([*calls * 3, "<answer>7</answer><eos>"])
    return draw.choice(["a of a?", "g of g?", "abc</result>", "no</result>", "1.5 s</result>"]) + turn


@pytest.fixture(scope="module")
def sampler(renderer, tmp_path_factory):
    from arpo_ext.rollout.vllm_sampler import VllmSampler

    folder = tmp_path_factory.mktemp("model")
    talker(renderer.tokenizer).save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    threads = torch.get_num_threads()
    engine = EngineConfig(max_model_len=256, max_num_seqs=48, threads=1)
    sampler = VllmSampler(folder, engine, RolloutConfig(**SETTINGS), renderer, seed=0)
    yield sampler
    sampler.close()
    torch.set_num_threads(threads)


class Killer(threading.Thread):
    """Every second ends the Python tool's server, or one of the processes below it, in turn."""

    def __init__(self, tool):
        super().__init__(daemon=True)
        self.tool, self.done, self.kills = tool, threading.Event(), Counter()

    def run(self):
        while not self.done.wait(1.0):
            server = self.tool._server
            below = [] if server is None else children(server._process.pid)
            turn = sum(self.kills.values()) % 2
            if turn and below:
                self.kill("worker", below[-1])
            elif server is not None:
                self.kill("server", server._process.pid)

    def kill(self, what, pid):
        os.kill(pid, signal.SIGKILL)
        self.kills[what] += 1


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def spoil(cache, monkeypatch):
    """After five answers the cache's disk is read-only, then full; both as the system and as SQLite says it."""
    real, count = cache._store.set, [0]
    faults = [
        OSError(errno.EROFS, "Read-only file system"),
        sqlite3.OperationalError("attempt to write a readonly database"),
        OSError(errno.ENOSPC, "No space left on device"),
        sqlite3.OperationalError("database or disk is full"),
    ]

    def set_(*arguments, **options):
        count[0] += 1
        if count[0] > 5:
            raise faults[count[0] % len(faults)]
        return real(*arguments, **options)

    monkeypatch.setattr(cache._store, "set", set_)
    return count


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_tree_completes_whatever_breaks(sampler, renderer, tmp_path, monkeypatch, caplog, deterministic):
    caplog.set_level(logging.WARNING)
    config = RolloutConfig(**SETTINGS, deterministic=deterministic)
    python = SlowPython()
    cache, records = AnswerCache(tmp_path / "cache"), tmp_path / "calls.jsonl"
    writes = spoil(cache, monkeypatch)
    killer = Killer(python.inner)
    pool = ToolPool([Flaky(), python], retry=Retry(attempts=1, delay_s=0.01), cache=cache, records=CallRecords(records))
    try:
        pool.__enter__()
    except ToolError as error:
        pytest.skip(str(error))
    with pool:
        killer.start()
        collected = collect(PROMPTS, sampler=sampler, tools=pool, renderer=renderer, config=config, seed=3)
        killer.done.set()
        killer.join()
        stats = pool.stats
    assert sampler.num_unfinished == 0
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    check_complete(collected.trees)
    check_counts(collected, stats, rows)
    check_results(collected.trees, rows)
    reasons = Counter(reason(row) for row in rows if not row["cached"])
    assert {"answer", "raised", "failed", "hung", "python raised", "python hung"} <= set(reasons), reasons
    assert sum(s.retries for s in stats.values()) >= 1
    assert killer.kills["server"] >= 2
    assert killer.kills["worker"] >= 1
    assert writes[0] > 9
    assert sum("tool cache" in record.getMessage() for record in caplog.records) == 1
    if deterministic:
        check_replay(sampler, renderer, config, collected, records)


def check_complete(trees):
    assert [tree.prompt_id for tree in trees] == [prompt.id for prompt in PROMPTS]
    for tree in trees:
        check_tree(
            tree,
            SETTINGS["paths"],
            SETTINGS["initial_paths"],
            max_tool_calls=SETTINGS["max_tool_calls"],
            max_response_tokens=SETTINGS["max_response_tokens"],
            probe_tokens=SETTINGS["probe_tokens"],
        )
        assert {leaf.end for leaf in tree.leaves} <= {StopReason.EOS, StopReason.LENGTH, StopReason.TOOL}


def check_counts(collected, stats, rows):
    """A call in the trees is one call of the pool and one record."""
    results = [s.tool for tree in collected.trees for s in tree.segments if s.tool is not None]
    calls = collected.metrics["rollout/tool_calls"]
    assert calls == sum(s.calls for s in stats.values()) == len(rows) >= 30
    assert calls + collected.metrics["rollout/tool_calls_refused"] == len(results)
    assert collected.metrics["rollout/tool_calls_abandoned"] == 0
    assert sum(s.cached for s in stats.values()) == sum(row["cached"] for row in rows)


def check_results(trees, rows):
    """What good calls answered is in the trees, no more and no less; what a failed one answered says why."""
    results = [segment.tool for tree in trees for segment in tree.segments if segment.tool is not None]
    assert Counter(r.text for r in results if r.ok) == Counter(
        f"<result>{r['result']}</result>" for r in rows if r["ok"]
    )
    assert all(len(r.text) > len("<result></result>") for r in results)


def reason(row):
    texts = {
        "raised": "failed: RuntimeError: defect",
        "hung": "the search tool did not answer",
        "python hung": "TimeoutError",
        "python raised": "ZeroDivisionError",
        "lost": "sandbox",
        "failed": "no",
    }
    if row["ok"]:
        assert row["result"] == (row["text"].upper() if row["name"] == "search" else row["text"])
        return "answer"
    return next((name for name, text in texts.items() if text in row["result"]), row["result"])


def check_replay(sampler, renderer, config, collected, records):
    """The records alone give the same trees again."""
    answers = read_records(records)
    with ToolPool([ReplayTool(name, answers[name], workers=4) for name in ("search", "python")]) as pool:
        again = collect(PROMPTS, sampler=sampler, tools=pool, renderer=renderer, config=config, seed=3)
    tokens = [[[s.tokens for s in tree.segments] for tree in c.trees] for c in (collected, again)]
    assert tokens[0] == tokens[1]
