"""Dynamic sampling: which prompts are drawn, kept and counted, on one rank and on several."""

import threading
import types
from dataclasses import dataclass

import pytest
import torch
from tiny import forked_tree

from arpo_ext.training.gather import gather_trees
from arpo_ext.types import Prompt


@dataclass
class Collected:
    trees: list
    metrics: dict


def prompt(number):
    return Prompt(str(number), ({"role": "user", "content": "?"},), ("a",))


def gathered(ranks, prompts, tries, flat):
    """What each rank gets where the prompts in `flat` have trees without spread, and all collect calls in order."""
    calls, results = [], {}
    barrier, board = threading.Barrier(ranks), {}

    def rank(index):
        def gather(tensor):
            board[index] = tensor
            barrier.wait(timeout=10)
            joined = torch.cat([board[i] for i in range(ranks)])
            barrier.wait(timeout=10)
            return joined

        def collect(own, attempt):
            calls.append((attempt, index, [p.id for p in own]))
            trees = [
                forked_tree((1.0, 1.0, 1.0) if int(p.id) in flat else (1.0, 0.0, 0.5), prompt_id=p.id) for p in own
            ]
            metrics = {"rollout/forks": len(own), "rollout/tool_calls_per_path": float(attempt)}
            if attempt == 1:
                metrics["rollout/forks_at_depth_2"] = 1.0
            return Collected(trees, metrics)

        accelerator = types.SimpleNamespace(process_index=index, num_processes=ranks, device="cpu", gather=gather)
        results[index] = gather_trees(
            accelerator,
            lambda start, count: [prompt(i) for i in range(start, start + count)],
            collect,
            lambda trees: trees,
            prompts=prompts,
            tries=tries,
        )

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return [results[i] for i in range(ranks)], sorted(calls)


def ids(trees):
    return [tree.prompt_id for tree in trees]


def test_without_tries_all_trees_are_kept():
    (result,), calls = gathered(1, 4, 0, flat={1, 2})
    assert ids(result.trees) == ids(result.scored) == ["0", "1", "2", "3"]
    assert calls == [(0, 0, ["0", "1", "2", "3"])]
    assert result.drawn == 4


def test_prompts_without_spread_are_replaced_by_the_next_ones():
    (result,), calls = gathered(1, 4, 3, flat={1, 2, 5})
    assert calls == [(0, 0, ["0", "1", "2", "3"]), (1, 0, ["4", "5"]), (2, 0, ["6"])]
    assert ids(result.trees) == ["0", "3", "4", "6"]
    assert ids(result.scored) == ["0", "1", "2", "3", "4", "5", "6"]
    assert result.drawn == 7
    # Counts of the three calls add up, what is per path is their mean by prompts.
    assert result.metrics == pytest.approx(
        {"rollout/forks": 7, "rollout/tool_calls_per_path": (2 * 1 + 1 * 2) / 7, "rollout/forks_at_depth_2": 1}
    )


def test_tries_are_bounded_and_what_is_missing_stays_out():
    (result,), calls = gathered(1, 3, 2, flat=set(range(100)))
    assert [ids for _, _, ids in calls] == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"]]
    assert result.trees == []
    assert len(result.scored) == result.drawn == 9


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_one_order_and_wait_for_each_other(ranks):
    flat = {0, 2, 4, 6}
    results, calls = gathered(ranks, 5, 4, flat)
    assert len({result.drawn for result in results}) == 1
    drawn = [name for _, _, own in calls for name in own]
    assert sorted(drawn, key=int) == [str(i) for i in range(results[0].drawn)]
    kept = [name for result in results for name in ids(result.trees)]
    assert len(kept) == 5
    assert not {int(name) for name in kept} & flat
    # Every rank trains as many trees as it was dealt at first.
    assert [len(result.trees) for result in results] == [len(range(r, 5, ranks)) for r in range(ranks)]
