"""The documents stay true: their Python runs, their commands are run by CI or by the tests, their links resolve."""

import json
import re
from pathlib import Path

import pytest

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


def ops_table() -> str:
    """The table of benchmarks/README.md: our median beside the best and the usual way without this package."""
    run = json.loads((ROOT / "benchmarks/results/ops_cpu.json").read_text())
    cases: dict[str, dict[str, dict]] = {}
    for row in run["rows"]:
        last = list(row).index("provider")
        columns = " ".join(f"{name}={row[name]}" for name in list(row)[1:last])
        cases.setdefault(f"`{row['op']}` {columns}", {})[row["provider"]] = row
    machine = run["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}:",
        "",
        "| case | ours, ms | GB/s | of read | torch.compile or vectorised, x ours | eager or Python loop, x ours |",
        "|---|---|---|---|---|---|",
    ]
    for case, rows in cases.items():
        ours = rows["arpo-ext"]
        better, usual = (
            next((rows[name]["times_ours"] for name in names if name in rows), None)
            for names in (("torch.compile", "torch vectorised"), ("torch eager", "Python loop"))
        )
        cells = ["" if ratio is None else f"{ratio:.1f}" for ratio in (better, usual)]
        measured = f"{ours['p50_ms']:.3g} | {ours['gbs']:.1f} | {ours['share_of_limit']:.0%}"
        lines.append(f"| {case} | {measured} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_benchmark_table_is_the_recorded_run():
    assert ops_table() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def headline_table() -> str:
    """The README's table: the forward of logprob_entropy at a decoder's vocabulary."""
    rows = json.loads((ROOT / "benchmarks/results/ops_cpu.json").read_text())["rows"]
    lines = [
        "| logits | `logprob_entropy` | of read bandwidth | torch.compile | torch eager |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        wanted = {"op": "logprob_entropy", "N": 256, "dtype": dtype, "pass": "forward"}
        case = {row["provider"]: row for row in rows if wanted.items() <= row.items()}
        ours = case["arpo-ext"]
        peers = (f"{case[n]['p50_ms']:.0f} ms ({case[n]['times_ours']:.0f}x)" for n in ("torch.compile", "torch eager"))
        lines.append(f"| {dtype} | {ours['p50_ms']:.1f} ms | {ours['share_of_limit']:.0%} | {' | '.join(peers)} |")
    return "\n".join(lines)


def test_the_readme_shows_the_recorded_benchmark():
    assert headline_table() in (ROOT / "README.md").read_text(encoding="utf-8")
