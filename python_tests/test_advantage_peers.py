"""Advantages against the functions that verl registers, from their own inputs to advantages by token.

Where the definitions differ (the table in ops/group_advantages.py) the difference is what a test states.
"""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch

from arpo_ext import ops
from benchmarks import _installed
from benchmarks._harness import Unavailable

ROWS, TOKENS = 24, 11
NAMES = {
    "grpo": "compute_grpo_outcome_advantage",
    "rloo": "compute_rloo_outcome_advantage",
    "opo": "compute_opo_outcome_advantage",
    "grpo_passk": "compute_grpo_passk_outcome_advantage",
    "reinforce_pp_baseline": "compute_reinforce_plus_plus_baseline_outcome_advantage",
}


def verl(estimator):
    """verl's function, without the registry around it."""
    try:
        trainer = _installed.folder("verl")
    except Unavailable as error:
        pytest.skip(str(error))
    utils = ["masked_sum", "masked_mean", "masked_var", "masked_whiten"]
    whitening = _installed.functions(trainer / "utils" / "torch_functional.py", utils)
    given = {
        "verl_F": type("verl_F", (), {name: staticmethod(function) for name, function in whitening.items()}),
        "register_adv_est": _installed.keep,
        "AdvantageEstimator": type("AdvantageEstimator", (), {"__getattr__": lambda self, name: name})(),
    }
    return _installed.functions(trainer / "trainer" / "ppo" / "core_algos.py", [NAMES[estimator]], given)[
        NAMES[estimator]
    ]


def batch(seed, groups=5):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=generator)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    reward = torch.zeros(ROWS, TOKENS)
    reward[torch.arange(ROWS), lengths - 1] = torch.randint(0, 5, (ROWS,), generator=generator) / 4
    names = np.array([f"prompt {i % groups}" for i in torch.randperm(ROWS, generator=generator).tolist()], dtype=object)
    return reward, mask, names


def ours(estimator, reward, mask, names, **options):
    tree, length = ops.first_occurrences(names), mask.sum(dim=-1)
    leaf = ops.group_advantages(reward.sum(dim=-1), tree, estimator=estimator, length=length, **options).leaf
    return ops.expand_advantages(leaf, mask)


@pytest.mark.parametrize("estimator", NAMES)
def test_it_is_what_verl_computes(estimator):
    """The same numbers wherever every group has two rewards that differ."""
    for seed in range(5):
        reward, mask, names = batch(seed)
        config = {"config": {}} if estimator == "grpo_passk" else {}
        theirs, _ = verl(estimator)(reward.clone(), mask, names, **config)
        assert theirs.abs().max() > 0.1
        # REINFORCE++: eps is inside verl's square root, where it is 1e-8.
        torch.testing.assert_close(ours(estimator, reward, mask, names, eps=1e-6), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_pp_baseline"])
def test_a_group_of_one_teaches_nothing_here_and_its_reward_in_verl(estimator):
    reward, mask, names = batch(0)
    names[3], reward[3] = "alone", reward[3] + 0.5
    theirs, _ = verl(estimator)(reward.clone(), mask, names)
    assert theirs[3, 0] > 0.4
    assert ours(estimator, reward, mask, names)[3].eq(0).all()


def test_verl_refuses_a_group_of_one_in_pass_k():
    reward, mask, names = batch(0)
    names[3] = "alone"
    with pytest.raises(ValueError, match="at least 2 samples per group"):
        verl("grpo_passk")(reward.clone(), mask, names, config={})
    assert ours("grpo_passk", reward, mask, names)[3].eq(0).all()


def test_a_flat_group_is_shifted_by_verl_s_whitening():
    """Unequal lengths move the mean over tokens away from 0, and verl moves the rows of a flat group with it."""
    reward, mask, names = batch(1)
    flat = names == names[0]
    reward[flat] = 0.0
    theirs, _ = verl("reinforce_pp_baseline")(reward.clone(), mask, names)
    mine = ours("reinforce_pp_baseline", reward, mask, names)
    rest = torch.from_numpy(~flat)
    assert theirs[~rest].unique().numel() == 2  # the shift, and 0 outside the mask
    assert mine[~rest].eq(0).all()
    torch.testing.assert_close(mine[rest], theirs[rest], rtol=2e-5, atol=2e-5)


def test_tree_grpo_as_its_code_does_it():
    """Two dictionaries after each other, as compute_tree_grpo_outcome_advantage has them, and the sum of equation 7."""
    generator = torch.Generator().manual_seed(4)
    reward = torch.randint(0, 4, (ROWS,), generator=generator) / 2
    prompt, tree = torch.arange(ROWS) // 12, torch.arange(ROWS) // 4

    def zscore(values, keys):
        groups = defaultdict(list)
        for value, key in zip(values, keys, strict=True):
            groups[key].append(value)
        mean = {key: torch.stack(group).mean() for key, group in groups.items()}
        std = {key: torch.stack(group).std() for key, group in groups.items()}
        pairs = zip(values, keys, strict=True)
        return torch.stack([(value - mean[key]) / (std[key] + 1e-6) for value, key in pairs])

    by_prompt = zscore(reward, prompt.tolist())
    got = ops.group_advantages(reward, prompt, estimator="tree_grpo", subgroup=tree).leaf
    torch.testing.assert_close(got, zscore(by_prompt, tree.tolist()), rtol=1e-5, atol=1e-5)
    got = ops.group_advantages(reward, prompt, estimator="tree_grpo_sum", subgroup=tree).leaf
    torch.testing.assert_close(got, by_prompt + zscore(reward, tree.tolist()), rtol=1e-5, atol=1e-5)
    # Numbers of trees may start at 0 for every prompt.
    again = ops.group_advantages(reward, prompt, estimator="tree_grpo_sum", subgroup=tree % 3).leaf
    assert again.equal(got)


def test_appo_as_its_code_does_it():
    """Rows and token positions, as compute_appo_advantage walks them, against segments of a tree.

    Two prompts; two initial rows and three branches each. A branch leaves its row after `split` of 8 tokens.
    """
    splits = {2: (0, 3), 3: (0, 6), 4: (1, 5)}  # branch row -> (initial row, tokens shared)
    reward = torch.tensor([0.0, 1.0, 1.0, 0.25, 0.5, 1.0, 0.0, 0.75, 0.0, 0.125])
    prompt = torch.arange(10) // 5
    branch = torch.arange(10) % 5 >= 2
    base = torch.zeros(10)
    for p, kind in itertools.product((0, 1), (False, True)):
        rows = (prompt == p) & (branch == kind)
        base[rows] = (reward[rows] - reward[rows].mean()) / (reward[rows].std(correction=0) + 1e-6)
    wanted = torch.zeros(10, 8)
    parent, ends, first_token = [], [0] * 10, []
    for p in (0, 1):
        root = len(parent)
        parent.append(-1)
        first_token.append((5 * p, None))
        for own in (0, 1):
            row = 5 * p + own
            cuts = sorted((cut, b) for b, (of, cut) in splits.items() if of == own)
            gains = torch.zeros(8), torch.zeros(8)
            above, start = root, 0
            for cut, b in [*cuts, (8, None)]:
                parent.append(above)
                above = len(parent) - 1
                first_token.append((row, start))
                start = cut
                if b is None:
                    ends[row] = above
                    continue
                parent.append(above)
                ends[5 * p + b] = len(parent) - 1
                first_token.append((5 * p + b, None))
                gains[0][:cut] += base[5 * p + b]
                gains[1][:cut] += 1
            wanted[row] = base[row] + gains[0] / gains[1].clamp(min=1)
    got = ops.group_advantages(
        reward,
        prompt,
        estimator="appo",
        subgroup=branch.long(),
        parent=torch.tensor(parent),
        leaf_segment=torch.tensor(ends),
    )
    torch.testing.assert_close(got.leaf, base, rtol=1e-5, atol=1e-5)
    for s, (row, token) in enumerate(first_token):
        if token is not None:
            torch.testing.assert_close(got.segment[s], wanted[row, token], rtol=1e-5, atol=1e-5)
        elif parent[s] != -1:
            assert got.segment[s] == 0
