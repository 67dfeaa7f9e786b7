"""The documents stay true: their Python runs, their commands are run by CI or by the tests, their links resolve."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/**/README.md")) if p.is_file()
)
DOCUMENTS = [p for p in DOCUMENTS if not {".venv", "build", "runs"} & set(p.relative_to(ROOT).parts)]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(path, capsys):
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), {})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_run_by_ci(path):
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for block in blocks(path, "sh") for line in block.splitlines()]
    assert not [line for line in lines if line and line not in ci]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_resolve(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]


MEASURES = {
    "accuracy": "accuracy",
    "reward": "reward",
    "tool_calls_per_question": "tool calls per question",
    "sampled_tokens": "sampled tokens",
}


def demo_table() -> str:
    """The README's table of the example: of the recorded seeds, the one that gained least on held-out questions."""
    runs = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("lookup_and_compute_*.json")]
    modes = ("sampled", "greedy")

    def gain(run):
        return min(run["after"][f"heldout/{m}/accuracy"] - run["before"][f"heldout/{m}/accuracy"] for m in modes)

    worst = min(runs, key=gain)
    lines = ["| held-out questions | sampled, before → after | greedy, before → after |", "|---|---|---|"]
    for measure, name in MEASURES.items():
        digits = 0 if measure == "sampled_tokens" else 3
        cells = [
            " → ".join(f"{worst[when][f'heldout/{mode}/{measure}']:,.{digits}f}" for when in ("before", "after"))
            for mode in modes
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        f"The worst of {len(runs)} seeds (seed {worst['seed']}): {worst['steps']} steps, "
        f"{worst['training_sampled_tokens']:,.0f} sampled tokens, {worst['training_tool_calls']:,.0f} tool calls, "
        f"{worst['training_forks']:,.0f} forks, {worst['seconds']} s in all on {worst['machine']['cores']} cores "
        f"({worst['machine']['processor']}).",
    ]
    return "\n".join(lines)


def test_the_readme_shows_the_worst_recorded_seed():
    assert demo_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_three_seeds_are_recorded_and_each_gains_fifteen_points():
    runs = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("lookup_and_compute_*.json")]
    assert len({run["seed"] for run in runs}) >= 3
    for run in runs:
        for mode in ("sampled", "greedy"):
            before, after = (run[when][f"heldout/{mode}/accuracy"] for when in ("before", "after"))
            assert 0.2 <= before <= 0.6
            assert after - before >= 0.15
        assert run["logprob_gap_max"] < 1e-3


@pytest.mark.parametrize("path", tables.FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_are_those_of_the_recorded_runs(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert tables.rendered(text) == text, "stale: python -m benchmarks.tables"
