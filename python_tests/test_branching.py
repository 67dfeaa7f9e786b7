"""What the branch rule is asked: windows, baselines, room."""

import logging
import math

import pytest

from arpo_ext.config import RolloutConfig
from arpo_ext.rollout import branching
from arpo_ext.rollout.branching import Brancher, Window, draw_seed, path_key


def _brancher(**config):
    return Brancher(RolloutConfig(**{"paths": 8, "initial_paths": 4, **config}), vocab_size=100, seed=3)


def _window(entropy, root, tree=0, key=1, turn=1):
    return Window(tree, key, turn, entropy, root)


def test_normalizers_are_the_mean_over_log_v_and_the_printed_sum_over_v():
    window = [0.5, 1.0, 3.0]
    assert _brancher().normalize(window) == pytest.approx(1.5 / math.log(100))
    assert _brancher(normalizer="sum_over_vocab").normalize(window) == pytest.approx(4.5 / 100)
    assert math.isnan(_brancher().normalize([]))


def test_paper_forks_where_entropy_rose_over_the_root():
    rose, fell, same, unknown = (
        _window(0.6, 0.2, key=1),
        _window(0.1, 0.2, key=2),
        _window(0.2, 0.2, key=3),
        _window(math.nan, 0.2, key=4),
    )
    branches = _brancher().decide([rose, fell, same, unknown], [4])
    assert [b.children for b in branches] == [1, 0, 0, 0]
    assert branches[0].score == pytest.approx(0.5 + 0.2 * 0.4, abs=1e-6)
    assert {b.room for b in branches} == {4}


def test_width_and_room_bound_what_is_granted():
    windows = [_window(0.9, 0.1, key=1), _window(0.8, 0.1, key=2), _window(0.9, 0.1, tree=1, key=1)]
    branches = _brancher(branch_width=2).decide(windows, [3, 0])
    assert [b.children for b in branches] == [2, 1, 0]


def test_chain_decides_nothing():
    assert _brancher(policy="chain").decide([_window(0.9, 0.1)], [4]) == [None]


def test_random_is_a_function_of_seed_path_and_turn():
    windows = [_window(0.0, 0.0, key=k, turn=t) for k in range(50) for t in (1, 2)]
    room = [1000]
    first = _brancher(policy="random").decide(windows, room)
    assert first[::-1] == _brancher(policy="random").decide(windows[::-1], room)
    granted = sum(b.children for b in first)
    assert 25 < granted < 75


def test_post_tool_compares_with_earlier_windows_of_the_call_only():
    brancher = _brancher(baseline="post_tool")
    # The start is the most uncertain place: against the root nothing would ever fork.
    first = brancher.decide([_window(0.10, 0.9, key=1), _window(0.30, 0.9, key=2)], [8])
    assert [b.children for b in first] == [0, 0]
    assert [b.score for b in first] == pytest.approx([0.5, 0.5])
    second = brancher.decide([_window(0.25, 0.9, key=1), _window(0.15, 0.9, key=2)], [8])
    assert [b.children for b in second] == [1, 0]
    assert second[0].score == pytest.approx(0.5 + 0.2 * (0.25 - 0.2))
    third = brancher.decide([_window(0.21, 0.9, key=1)], [8])
    assert third[0].score == pytest.approx(0.5 + 0.2 * (0.21 - 0.2))
    assert _brancher(baseline="post_tool").decide([_window(0.25, 0.9)], [8])[0].children == 0


def test_no_windows_no_decisions():
    assert _brancher().decide([], [4]) == []


def test_keys_and_seeds_depend_on_every_part():
    keys = {path_key(lineage) for lineage in [(0,), (1,), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 1, 0, 2, 0)]}
    assert len(keys) == 6
    assert all(-(2**63) <= key < 2**63 for key in keys)
    seeds = {draw_seed(*parts) for parts in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_equal_base_and_threshold_warn_once(caplog):
    branching._warn_of_sign_rule.cache_clear()
    with caplog.at_level(logging.WARNING):
        _brancher(), _brancher()
        _brancher(base=0.4), _brancher(policy="chain"), _brancher(policy="random")
    assert [r.message for r in caplog.records] == [
        "rollout.base and rollout.threshold are both 0.5: a path forks whenever its entropy rose, "
        "whatever rollout.weight is"
    ]
