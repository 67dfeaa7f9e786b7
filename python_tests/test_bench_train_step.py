"""The trees, the providers and the rows of bench_train_step."""

import json

import pytest
import torch

from arpo_ext.training.packing import pack
from benchmarks import bench_train_step
from benchmarks._train_trees import SHAPES, Lengths, token_counts
from benchmarks.tables import train_step_table


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("paths", [1, 2, 16])
def test_trees_have_their_paths_and_share_what_they_say(shape, paths):
    trees = [SHAPES[shape](paths, Lengths(20, 12, 8, 3), 512, seed) for seed in range(3)]
    for tree in trees:
        rows = [torch.tensor(tree.path_tokens(leaf.segment)) for leaf in tree.leaves]
        assert len(rows) == paths
        unique, total = token_counts([tree])
        assert total == sum(map(len, rows))
        # Random tokens seldom agree by chance.
        assert unique - 4 * paths <= len(pack(rows).tokens) <= unique
        for leaf in tree.leaves:
            text = list(tree.response_segments(leaf))
            assert (
                sum(
                    s.sampled
                    for s, after in zip(text, [*text[1:], None], strict=True)
                    if not after or not after.sampled
                )
                == 3
            )
    assert (unique < total) is (paths > 1)


def test_every_provider_does_the_same_step(tmp_path, capsys):
    path = tmp_path / "train_step.json"
    argv = ["--models", "40k", "--shapes", "appo-like,one small tree", "--rounds", "1", "--json", str(path)]
    assert bench_train_step.main([*argv, "--device", "cpu"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["rows", "tree", "torch", "TRL"] * 2
    missing = [row for row in rows if "reason" in row]
    assert all(row["provider"] == "TRL" and "trl" in row["reason"] for row in missing)
    assert all(row["p50_s"] > 0 for row in rows if row not in missing)
    assert [row["bound"] for row in rows if "bound" in row] == [pytest.approx(rows[1]["unique_share"] + 0.2), 1.0]
    table = train_step_table({"rows": rows}).splitlines()
    assert len(table) == 4
    assert table[3].startswith("| 40k, one small tree | ")


def test_a_wrong_step_is_not_timed(monkeypatch):
    (case,) = bench_train_step.cases(["40k"], ["one small tree"])
    monkeypatch.setattr(bench_train_step.Step, "plain", lambda self: lambda: (0.0, 5.0))
    with pytest.raises(SystemExit, match="torch has loss and gradient norm"):
        bench_train_step.run(case, 1, "cpu", ["rows", "torch"])


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_train_step.main(["--models", "70B"])
    assert "unknown model '70B'; expected 40k, 1M, 10M, 50M" in capsys.readouterr().err
