"""What other packages get wrong on rows that occur in training, beside ours on the same rows.

Each test names the package, its version is pinned in `benchmarks._installed.PEERS`, and runs the package's own code. A
test fails when a package mends its fault: then say so in benchmarks/README.md. -inf logits come from grammar masks and
padded vocabularies, rows far below zero from the same, nearly certain tokens from every trained model.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arpo_ext import ops
from benchmarks import _installed, _peers
from benchmarks._harness import Unavailable

INF = math.inf


def peer(make, *args):
    """The peer's callable; the test is skipped where the package is absent."""
    try:
        return make(*args)
    except Unavailable as error:
        pytest.skip(str(error))


def rows_of(vocab=2050):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, vocab, generator=generator), torch.tensor([1500, 1501, 1502, 1503])


def exact(logits, labels):
    """In float64, a logit of -inf adding nothing."""
    log_p = logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0)).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def assert_ours_is_right(logits, labels, tolerance=2e-6):
    for got, want in zip(ops.logprob_entropy(logits, labels), exact(logits, labels), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("name", ["trl_eager", "verl_eager", "verl_chunked"])
def test_entropy_is_nan_for_any_logit_of_minus_infinity(name):
    """TRL 1.16 eager and verl 0.9.1: 0 * -inf in the sum of p * x (or of p * log p)."""
    call = peer(getattr(_peers, name))
    logits, labels = rows_of()
    logits[:, 7] = -INF
    logprob, entropy = call(logits, labels)
    assert logprob.isfinite().all()
    assert entropy.isnan().all()
    assert_ours_is_right(logits, labels)


@pytest.mark.parametrize("name", ["trl_linear", "verl_linear", "liger_linear"])
def test_a_hidden_state_that_masks_one_token_makes_the_linear_forms_nan(name):
    """TRL, verl and Liger from hidden states: a weight row that scores -inf, as a masked head's does."""
    call = peer(getattr(_peers, name))
    hidden = torch.cat([torch.ones(4, 1), torch.zeros(4, 7)], dim=1)
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    weight[3] = torch.tensor([-INF] + [1.0] * 7)
    labels = torch.tensor([5, 6, 7, 8])
    assert call(hidden, weight, labels)[1].isnan().all()
    assert_ours_is_right(hidden @ weight.T, labels)


def test_entropies_in_bfloat16_are_off_by_more_than_two_hundredths_of_a_nat():
    """TRL eager and verl: every step rounded to bfloat16. Ours computes in float32 whatever the logits' dtype."""
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(16, 32_000, generator=generator)).bfloat16()
    labels = torch.randint(32_000, (16,), generator=generator)
    _, want = exact(logits, labels)
    for make in (_peers.trl_eager, _peers.verl_eager):
        _, entropy = peer(make)(logits, labels)
        assert (entropy.double() - want).abs().max() > 0.02
    assert_ours_is_right(logits, labels, tolerance=1e-5)


def nearly_certain():
    """p_max = 1 - 1e-6, at an offset where a model's logits may lie."""
    logits = torch.zeros(1, 1024)
    logits[0, 0] = math.log(1e6 * 1023)
    return logits + 10, torch.tensor([0])


def assert_off_by(entropy, share):
    logits, labels = nearly_certain()
    _, want = exact(logits, labels)
    assert float((entropy / want - 1).abs()) > share
    _, ours = ops.logprob_entropy(logits, labels)
    torch.testing.assert_close(ours.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "share"), [("verl_eager", 0.02), ("verl_chunked", 0.02), ("trl_eager", 1e-3)])
def test_entropy_of_a_nearly_certain_row_is_off(name, share):
    """In float32. verl subtracts two numbers near 30 to get 2e-5, TRL eager rounds log p of the sure token."""
    assert_off_by(peer(getattr(_peers, name))(*nearly_certain())[1], share)


# Run once in a process of its own: Triton decides at import whether kernels are interpreted.
INTERPRETED = """
import json, math, sys
import torch
from benchmarks import _peers
from benchmarks._harness import Unavailable
from python_tests.test_peers import nearly_certain, rows_of

def trl_one():
    logits, labels = rows_of()
    logits[:, 7] = -math.inf
    return [part.tolist() for part in _peers.trl_triton()(logits, labels)]

def trl_block():
    logits, labels = rows_of()
    logits[:, :1024] = -math.inf
    return [part.tolist() for part in _peers.trl_triton()(logits, labels)]

def trl_certain():
    return [part.tolist() for part in _peers.trl_triton()(*nearly_certain())]

def liger_block():
    logits, labels = rows_of(2100)
    logits[:, :2048] = -math.inf
    labels = (labels + 560).unsqueeze(0)
    padded = torch.cat([logits, logits[:1]]).unsqueeze(0)  # [B, T + 1, V]; the last position is not scored
    logprob = _peers.liger_logprob_triton()(padded, labels)
    loss = _peers.liger_grpo_triton()(padded, None, labels, torch.ones(1), None, 0.2, 0.2)
    return [logprob[0].tolist(), loss[0].tolist()]

def verl_low():
    kernels = _peers.verl_kernels()
    logits, labels = rows_of()
    logits -= 120
    # What the main loop leaves for each split of 1024 columns; it needs a matrix product, the fault lies after it.
    splits = [part.double() for part in logits.split(1024, dim=1)]
    top = torch.stack([part.amax(1) for part in splits], 1)
    powers = [(part - m.unsqueeze(1)).exp() for part, m in zip(splits, top.unbind(1))]
    total = torch.stack([e.sum(1) for e in powers], 1).float()
    weighted = torch.stack([(e * part).sum(1) for e, part in zip(powers, splits)], 1).float()
    top = top.float()
    n, count = top.shape
    made = [torch.empty(n) for _ in range(4)]
    logprob = logits.gather(1, labels.unsqueeze(1)).squeeze(1).contiguous()
    arguments = [top, count, 1, n, count, made[0], 1, total, count, 1, made[1], 1, weighted, count, 1, made[2], 1]
    epilogue = kernels.efficient_entropy_triton_kernel_epilogue
    epilogue.fn[(1,)](
        *arguments, made[3], 1, logprob, 1, torch.empty(()), 0, BLOCK_SIZE_M=16, BLOCK_SIZE_N=64
    )
    return [logprob.tolist(), made[3].tolist()]

results = {}
for call in (trl_one, trl_block, trl_certain, liger_block, verl_low):
    try:
        results[call.__name__] = call()
    except (Unavailable, ImportError) as error:
        results[call.__name__] = str(error)
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def interpreted():
    """name of a case -> what the peer's Triton kernel returned for it under Triton's interpreter."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)

    def tensors(name):
        if isinstance(results[name], str):
            pytest.skip(results[name])
        return [torch.tensor(part) for part in results[name]]

    return tensors


def test_trl_triton_entropy_is_nan_for_any_logit_of_minus_infinity(interpreted):
    logprob, entropy = interpreted("trl_one")
    assert logprob.isfinite().all()
    assert entropy.isnan().all()
    logits, labels = rows_of()
    logits[:, 7] = -INF
    assert_ours_is_right(logits, labels)


def test_trl_triton_is_nan_where_the_first_block_is_minus_infinity(interpreted):
    """The first 1024 columns masked: the running maximum is -inf, and -inf - -inf is NaN."""
    logprob, entropy = interpreted("trl_block")
    assert logprob.isnan().all()
    assert entropy.isnan().all()
    logits, labels = rows_of()
    logits[:, :1024] = -INF
    assert_ours_is_right(logits, labels)


def test_trl_triton_entropy_of_a_nearly_certain_row_is_off_by_percents(interpreted):
    """log Z minus the mean logit, both near 30."""
    assert_off_by(interpreted("trl_certain")[1], 0.02)


def test_liger_logprob_is_nan_where_the_first_block_is_minus_infinity(interpreted):
    """Liger 0.8.5, the first 2048 columns masked: NaN although the labels' logits are finite.

    Its GRPO loss hides that: with the ratio NaN the minimum takes the clip's bound, -0.8 where -1 is right.
    """
    logprob, loss = interpreted("liger_block")
    assert logprob.isnan().all()
    torch.testing.assert_close(loss, torch.full((4,), -0.8))
    logits, labels = rows_of(2100)
    logits[:, :2048] = -INF
    assert_ours_is_right(logits, labels + 560)


def test_verl_triton_epilogue_fails_on_rows_far_below_zero(interpreted):
    """verl 0.9.1: its epilogue starts the maximum at 0, so e^(x - 0) underflows when all logits lie near -120."""
    logprob, entropy = interpreted("verl_low")
    assert (logprob == INF).all()
    assert not entropy.isfinite().any()
    logits, labels = rows_of()
    assert_ours_is_right(logits - 120, labels)


def test_a_missing_or_other_version_is_refused_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(_installed.PEERS, "absent-package", "1.0")
    with pytest.raises(
        Unavailable, match=r"absent-package is not installed: pip install absent-package==1\.0 --no-deps"
    ):
        _installed.folder("absent-package")
    monkeypatch.setitem(_installed.PEERS, "pytest", "0.1")
    with pytest.raises(Unavailable, match=rf"pytest {pytest.__version__} is installed, known is 0\.1: pip install"):
        _installed.folder("pytest")


def test_functions_are_taken_out_with_what_they_use_and_nothing_else(tmp_path):
    source = tmp_path / "installed.py"
    source.write_text(
        "import no_such_package\n"
        "import math\n"
        "try:\n    import other_absent\n    FAST = True\nexcept ImportError:\n    FAST = False\n"
        "SCALE = 2\n"
        "def helper(x): return SCALE * x + math.pi\n"
        "@no_such_package.register('f')\n"
        "def unwanted(x): return x\n"
        "def wanted(x: no_such_package.Type) -> no_such_package.Type:\n    return (helper(x), FAST, outside(x))\n"
        "class Trainer(no_such_package.Base):\n    def loss(self, x): return self.scale * helper(x)\n"
    )
    found = _installed.functions(source, ["wanted", "Trainer.loss"], {"outside": lambda x: -x})
    assert found["wanted"](1) == (2 + math.pi, False, -1)
    assert found["Trainer.loss"](type("Stand", (), {"scale": 3}), 0) == 3 * math.pi
