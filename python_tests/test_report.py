"""The report of a run folder: numbers right, hostile text inert, one file, and it works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from arpo_ext.config import Config, dump_config
from arpo_ext.errors import DataError
from arpo_ext.evaluation.report import final_table, write_report
from arpo_ext.types import Branch, Leaf, RolloutTree, Segment, StopReason, ToolResult

HOSTILE = '</script><img src=x onerror="alert(1)"><script>alert("owned")</script>{{ 7 * 7 }} \u2028 & "q"'
VOID = {"meta", "link", "img", "br", "input", "hr"}
STEPS = 12
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def sampled(parent: int, text: str, entropies: list[float], **more) -> Segment:
    tokens = tuple(range(len(entropies)))
    return Segment(parent, tokens, True, text=text, logprobs=(-0.5,) * len(tokens), entropies=tuple(entropies), **more)


def result(
    parent: int, name: str, text: str, *, ok: bool = True, cached: bool = False, seconds: float = 0.02
) -> Segment:
    tool = ToolResult(name=name, text=text, ok=ok, seconds=seconds, cached=cached)
    return Segment(parent, (7, 8, 9), False, text=f"<result>{text}</result>", tool=tool)


def example_tree(step: int, number: int) -> RolloutTree:
    """Two paths from the prompt; the first forks after its search. Entropies fall as the steps go on."""
    rng = random.Random(100 * step + number)
    level = 1.0 - step / (1.5 * STEPS)

    def noise(count: int) -> list[float]:
        return [level * rng.random() ** 2 for _ in range(count)]

    query = "<think> I need the mass of bornak </think><search> mass of bornak</search>"
    segments = (
        Segment(-1, tuple(range(14)), False, text="question: add the mass of bornak and the age of telvo"),
        sampled(0, query, noise(16), stop_reason=StopReason.TOOL, probe_entropy=0.4),
        result(1, "search", "bornak : mass 47 , age 12"),
        sampled(2, "<think> have it, now telvo</think><search> age of telvo</search>", noise(15),
                stop_reason=StopReason.TOOL, probe_entropy=0.7, branch=Branch(0.54, 2, 1)),
        result(3, "search", "telvo : age 31 , mass 90", cached=number % 2 == 1),
        sampled(4, "<think> compute</think><python> print(47+31)</python>", noise(18), stop_reason=StopReason.TOOL,
                probe_entropy=0.1, branch=Branch(0.38, 1, 0)),
        result(5, "python", "78", seconds=0.4),
        sampled(6, "<answer> \\boxed{78}</answer>", noise(9), stop_reason=StopReason.EOS),
        sampled(2, "<think> guess</think><answer> \\boxed{47}</answer>", noise(11), stop_reason=StopReason.EOS),
        sampled(0, "<python> print(1/0)</python>", noise(8), stop_reason=StopReason.TOOL),
        result(9, "python", "ZeroDivisionError: division by zero", ok=False, seconds=0.1),
        sampled(10, "<answer> \\boxed{0", noise(24), stop_reason=StopReason.LENGTH),
    )  # fmt: skip
    leaves = (
        Leaf(7, StopReason.EOS, reward=1.1, accuracy=1.0, advantage=1.05),
        Leaf(8, StopReason.EOS, reward=0.0, accuracy=0.0, advantage=-0.21),
        Leaf(11, StopReason.LENGTH, reward=-1.0, accuracy=0.0, advantage=-0.84),
    )
    return RolloutTree(
        f"q{number}", "add the mass of bornak and the age of telvo", ("78",), "paper", step, segments, leaves,
        {"step": step},
    )  # fmt: skip


def train_row(step: int, rng: random.Random) -> dict:
    part = step / STEPS
    return {
        "reward/mean": -0.2 + part + 0.1 * rng.random(), "reward/std": 0.8 - 0.4 * part,
        "reward/accuracy": 0.3 + 0.6 * part,
        "rollout/tool_calls": 250 - step, "rollout/tool_calls_per_path": 1.9, "rollout/sampled_tokens": 4000 + step,
        "rollout/forks": 30 - step, "rollout/fresh_paths": 10 + step, "rollout/seconds": 1.2 + 0.2 * rng.random(),
        "rollout/decode_seconds": 0.9, "rollout/tool_wait_seconds": 0.2 + 0.1 * rng.random(),
        "train/loss": 0.01 * rng.gauss(0, 1), "train/grad_norm": 0.5 + 0.2 * rng.random(), "train/clip_fraction": 0.01,
        "train/entropy": 0.2 * (1 - part) + 0.02, "train/logprob_gap_mean": 1e-6 * (1 + rng.random()),
        "train/logprob_gap_max": 3e-4 * (1 + rng.random()), "train/ratio_max": 1.0 + 0.01 * rng.random(),
        "train/seconds": 0.4 + 0.1 * rng.random(), "push/seconds": 0.05,
    }  # fmt: skip


def eval_row(accuracy: float, mode: str) -> dict:
    values = {"accuracy": accuracy, "accuracy_se": 0.034, "reward": accuracy * 1.05 - 0.1, "format_ok": 0.95}
    values |= {"tool_calls_per_question": 1.86, "sampled_tokens": 4321}
    return {f"eval/held/{mode}/{name}": value for name, value in values.items()}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_rows() -> list[dict]:
    rng = random.Random(0)
    rows = [
        {"step": step, "kind": "sft", "time_s": step, "sft/loss": 4.9 * math.exp(-step / 40), "sft/lr": 3e-3}
        for step in range(1, 200)
    ]
    rows.append({"step": 0, "kind": "eval", "time_s": 0.0, **eval_row(0.3625, "sampled"), **eval_row(0.31, "greedy")})
    rows += [
        {"step": step, "kind": "train", "time_s": 3.0 * step, **train_row(step, rng)} for step in range(1, STEPS + 1)
    ]
    rows.append(
        {"step": STEPS, "kind": "eval", "time_s": 40, **eval_row(0.9125, "sampled"), **eval_row(0.99, "greedy")}
    )
    return rows


def write_run(folder: Path, *, trees: list[RolloutTree] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(Config()), encoding="utf-8")
    write_rows(folder / "metrics.jsonl", metric_rows())
    if trees is None:
        trees = [example_tree(step, number) for step in range(1, STEPS + 1) for number in range(3)]
    write_rows(folder / "trees.jsonl", [tree.to_json() for tree in trees])
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo-run")


class Page(HTMLParser):
    """Checks that tags nest and close, and keeps tags with their attributes and the text that a reader sees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def find(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def trees(self) -> list[dict]:
        return [json.loads(script) for script in self.scripts if script.startswith("{")]


def test_page_shows_the_run(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html", "trees.jsonl"]
    page = Page(path)
    words = " ".join(page.text.split())
    assert "demo-run" in words
    totals = {"tool calls": "2,922", "sampled tokens": "48,078", "forks": "282", "training steps": "12"}
    for label, value in totals.items():
        assert f"<b>{value}</b><span>{label}</span>" in page.source
    assert "<span>rollout.policy <b>paper</b></span>" in page.source
    assert "0.362 ±0.034 → 0.912 ±0.034" in words
    assert "rollout.initial_paths8" in words.replace(" ", "")
    for title in ("Policy loss", "Gradient norm", "Token entropy", "Tool calls per step", "Time per step"):
        assert f"<figcaption>{title}</figcaption>" in page.source
    assert "after search" in words
    assert "Not logged in this run: Speed." in words
    assert len(page.trees) == 3 * STEPS
    assert page.trees[0]["segments"][3]["branch"] == {"score": 0.54, "room": 2, "children": 1}
    assert page.trees[0]["segments"][10]["tool"] == {"name": "python", "ok": False, "seconds": 0.1, "cached": False}
    assert page.trees[-1]["leaves"][0] == {
        "segment": 7,
        "end": "eos",
        "reward": 1.1,
        "accuracy": 1.0,
        "advantage": 1.05,
    }


def test_page_needs_nothing_from_outside(run_dir):
    page = Page(write_report(run_dir))
    source = page.source.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//cdn|@import|url\(|fetch\(|XMLHttpRequest|import\(", source)
    for tag, attributes in page.tags:
        assert not attributes.get("src"), f"{tag} loads {attributes['src']}"
        href = attributes.get("href", "#")
        assert href.startswith("#") or href == "data:,", f"{tag} links to {href}"
    policy = next(meta["content"] for meta in page.find("meta") if "http-equiv" in meta)
    script = next(script for script in page.scripts if not script.startswith("{"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def hostile_run(folder: Path) -> Path:
    """A run in which every text that a model, a tool, a file name or a user can choose tries to break out."""
    tree = RolloutTree(
        HOSTILE, HOSTILE, (HOSTILE,), HOSTILE, 1,
        (
            Segment(-1, (1,), False, text=HOSTILE),
            sampled(0, HOSTILE, [0.5, math.nan], stop_reason=StopReason.TOOL, branch=Branch(math.nan, 1, 0)),
            result(1, HOSTILE, HOSTILE),
            sampled(2, HOSTILE, [0.5], stop_reason=StopReason.EOS),
        ),
        (Leaf(3, StopReason.EOS),),
        {"step": 1},
    )  # fmt: skip
    write_run(folder, trees=[tree])
    rows = [{"step": 1, "kind": "eval", "time_s": 0, f"eval/{HOSTILE}/{HOSTILE}/accuracy": 0.5, HOSTILE: 1.0}]
    write_rows(folder / "metrics.jsonl", metric_rows() + rows)
    (folder / "config.yaml").write_text(json.dumps({"model": {"path": HOSTILE}, HOSTILE: HOSTILE}), encoding="utf-8")
    return folder


def test_text_of_the_run_stays_text(tmp_path):
    plain = Page(write_report(write_run(tmp_path / "plain", trees=[])))
    page = Page(write_report(hostile_run(tmp_path / "<img src=x onerror=alert(2)>")))
    assert not page.find("img")
    assert [attributes for attributes in page.find("script") if attributes.get("type") != "application/json"] == [{}]
    assert [script for script in page.scripts if "owned" in script and not script.startswith("{")] == []
    allowed = {name for _, attributes in plain.tags for name in attributes}
    assert {name for _, attributes in page.tags for name in attributes} <= allowed | {"type", "id", "data-shade"}
    assert page.text.count(HOSTILE) >= 4
    tree = page.trees[0]
    assert tree["segments"][2]["text"] == f"<result>{HOSTILE}</result>"
    assert tree["segments"][1]["bars"] == [0.5, None]
    assert tree["segments"][1]["branch"]["score"] is None


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "trees.jsonl"])
def test_page_says_what_is_missing(run_dir, kept):
    for path in run_dir.iterdir():
        if path.name != kept:
            path.unlink()
    page = Page(write_report(run_dir))
    for name in {"config.yaml", "metrics.jsonl", "trees.jsonl"} - {kept}:
        assert f"{name} is missing" in page.text
    assert ("This run logged no evaluation" in page.text) == (kept != "metrics.jsonl")
    assert ("This run stored no rollout trees" in page.text) == (kept != "trees.jsonl")
    assert ("settings of this run are not known" in page.text) == (kept != "config.yaml")


def test_page_of_a_supervised_run(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [row for row in metric_rows() if row["kind"] == "sft"])
    page = Page(write_report(tmp_path))
    assert "<figcaption>Loss of the supervised start</figcaption>" in page.source
    assert "Not logged in this run: Accuracy on held-out questions; Reward of the rollouts" in page.text
    assert final_table(tmp_path).splitlines()[-1] == "loss of the supervised start: 4.779 -> 0.034"


def test_a_file_that_is_being_written_is_readable(run_dir):
    whole = final_table(run_dir)
    for name in ("metrics.jsonl", "trees.jsonl"):
        with (run_dir / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 13, "kind": "train", "reward/mean": 0.')
    page = Page(write_report(run_dir))
    assert final_table(run_dir) == whole
    assert len(page.trees) == 3 * STEPS
    assert "unreadable" not in page.text


def test_broken_lines_are_counted(run_dir):
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'not json\n[1, 2]\n\xff\xfe\n\n{"kind": "train"}\n')
    with (run_dir / "trees.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"version": 99}\n')
    page = Page(write_report(run_dir))
    assert "metrics.jsonl: 4 unreadable lines passed over" in page.text
    assert "trees.jsonl: 1 unreadable line passed over" in page.text


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match="does not exist; expected a folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(DataError, match=r"is no run folder; expected config\.yaml, metrics\.jsonl or trees\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="is no run folder"):
        final_table(tmp_path)


def browse(path: Path, profile: Path) -> tuple[str, str]:
    """The page as a browser leaves it after its scripts ran, and what the browser wrote to its console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    options += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium on PATH")
@pytest.mark.parametrize("make", [write_run, hostile_run])
def test_page_works_in_a_browser(tmp_path, make):
    dom, console = browse(write_report(make(tmp_path / "run")), tmp_path / "profile")
    assert console == ""
    stored = json.loads((tmp_path / "run" / "trees.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert f'data-segments="{len(stored["segments"])}"' in dom
    assert dom.count('<article class="segment') == len(stored["segments"])
    assert dom.count('class="leaf"') == len(stored["leaves"])
    assert '<g class="block">' in dom
    assert "<img" not in dom
