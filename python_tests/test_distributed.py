"""Two processes joined by gloo do what one does, with DDP and with FSDP2, also when one has fewer trees or none."""

import copy
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import forked_tree, tiny_model, tiny_tokenizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from arpo_ext.config import Config, TrainConfig
from arpo_ext.data import Demo, DemoSegment
from arpo_ext.tracking import Tracker
from arpo_ext.training import checkpoint, named_weights, sft
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import plan_updates
from arpo_ext.training.prepare import prepare, prepare_reference
from arpo_ext.training.step import policy_step

SHARDINGS = ("none", "fsdp2")
# Of each step the rewards of three trees over two ranks; rank 1 has one tree, and at first none of its rows is trained.
REWARDS = (
    ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.5, 1.0)),
    ((0.0, 0.0, 3.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0)),
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
)


def start(sharding, **settings):
    config = TrainConfig(lr=1e-2, micro_batch_rows=2, loss_scale="sequence_mean", sharding=sharding, **settings)
    plain = tiny_model()
    reference = copy.deepcopy(plain).requires_grad_(False).eval() if config.kl_coef else None
    accelerator, model, optimizer = prepare(plain, config)
    if reference is not None:
        reference = prepare_reference(accelerator, reference, config)
    return config, {"accelerator": accelerator, "model": model, "optimizer": optimizer}, reference


def step(number, config, parts, reference=None):
    rank, ranks = parts["accelerator"].process_index, parts["accelerator"].num_processes
    trees = [forked_tree(own, prompt_id=str(i)) for i, own in enumerate(REWARDS[number])][rank::ranks]
    updates = plan_updates(credit_trees(trees, estimator="grpo"), config, seed=0, pad_token=0)
    return policy_step(**parts, updates=updates, config=config, temperature=1.0, pad_token=0, reference=reference)


def save(folder, parts, done):
    checkpoint.save(folder, checkpoint.RunState(done, 8), {}, tokenizer=tiny_tokenizer(), **parts)


def assert_wrapped(parts, sharding):
    """accelerate would turn FSDP on a CPU into DDP without a word."""
    if parts["accelerator"].num_processes == 1:
        return
    sharded = sharding == "fsdp2"
    assert all(isinstance(p, DTensor) == sharded for p in parts["model"].parameters())
    assert isinstance(parts["model"], DistributedDataParallel) != sharded


def policy_run(folder: Path, sharding: str) -> None:
    """Two steps, a checkpoint, a third step, another checkpoint, and the weights as each rank would push them."""
    config, parts, _ = start(sharding)
    assert_wrapped(parts, sharding)
    metrics = [step(0, config, parts), step(1, config, parts)]
    save(folder, parts, 2)
    metrics.append(step(2, config, parts))
    save(folder, parts, 3)
    pushed = dict(named_weights(parts["accelerator"].unwrap_model(parts["model"])))
    torch.save((metrics, pushed), folder / f"rank_{parts['accelerator'].process_index}.pt")


def resumed_run(folder: Path, source: Path, sharding: str) -> None:
    """The third step from a checkpoint of whatever number of processes."""
    config, parts, _ = start(sharding)
    state = checkpoint.load(source / "checkpoints" / "step_000002", {}, **parts)
    assert state.step == 2
    assert_wrapped(parts, sharding)
    step(2, config, parts)
    save(folder, parts, 3)


def measured_run(folder: Path, sharding: str) -> None:
    """Forwards before the update, of the policy and of a reference, where the ranks have unequal numbers of trees."""
    config, parts, reference = start(sharding, kl_coef=0.1, old_logprob="trainer", updates_per_step=2)
    step(0, config, parts, reference)
    metrics = step(1, config, parts, reference)
    torch.save(metrics, folder / f"rank_{parts['accelerator'].process_index}.pt")


def sft_run(folder: Path, sharding: str) -> None:
    """Batches of 5 rows over 2 ranks: one rank has a row fewer."""
    demos = [
        Demo((DemoSegment(train=False, text="a" * n), DemoSegment(train=True, text="b" * n + "<eos>")))
        for n in range(1, 8)
    ]
    config = Config.model_validate(
        {
            "output_dir": folder,
            "sft": {"steps": 3, "batch_size": 5, "micro_batch_size": 2, "warmup_steps": 0, "sharding": sharding},
            "tracking": {"tensorboard": False, "progress": False},
        }
    )
    with Tracker(folder, config.tracking) as tracker:
        sft(config, model=tiny_model(), tokenizer=tiny_tokenizer(), demos=demos, tracker=tracker)


def runs(folder: Path, shardings=SHARDINGS) -> None:
    for sharding in shardings:
        for name, run in (("policy", policy_run), ("measured", measured_run), ("sft", sft_run)):
            (folder / sharding / name).mkdir(parents=True, exist_ok=True)
            run(folder / sharding / name, sharding)


def two_ranks(folder: Path, one: Path) -> None:
    runs(folder)
    for sharding in SHARDINGS:
        resumed_run(folder / sharding / "resumed", one / "none" / "policy", sharding)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    runs(one, ["none"])
    run_ranks(f"import test_distributed as t; t.two_ranks(t.Path({str(two)!r}), t.Path({str(one)!r}))")
    return one, two


def weights_of(folder):
    return tiny_model().from_pretrained(folder).state_dict()


def assert_equal_models(one, other):
    for (name, a), b in zip(weights_of(one).items(), weights_of(other).values(), strict=True):
        assert torch.allclose(a, b, atol=5e-5), f"{name} is off by {float((a - b).abs().max())}"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_equal_one(folders, sharding):
    one, two = (folder / name for folder, name in zip(folders, ("none", sharding), strict=True))
    for done in (2, 3):
        place = f"policy/checkpoints/step_{done:06d}"
        assert_equal_models(one / place / "model", two / place / "model")
        assert len(torch.load(two / place / "rng.pt")) == 2
    assert_equal_models(one / "sft" / "model", two / "sft" / "model")
    single, *ranks = (torch.load(folder / "policy" / f"rank_{r}.pt") for folder, r in ((one, 0), (two, 0), (two, 1)))
    for metrics, pushed in ranks:
        for own, expected in zip(metrics, single[0], strict=True):
            assert own == pytest.approx(expected, rel=1e-4, abs=1e-6)
        # Every rank pushes the weights that were saved, whole and once.
        saved = weights_of(two / "policy" / "checkpoints" / "step_000003" / "model")
        assert pushed.keys() == single[1].keys() == saved.keys() - {"lm_head.weight"}
        assert all(type(tensor) is torch.Tensor and torch.equal(saved[name], tensor) for name, tensor in pushed.items())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_checkpoint_goes_on_with_another_number_of_processes(folders, sharding, tmp_path):
    one, two = folders
    expected = one / "none" / "policy" / "checkpoints" / "step_000003"
    assert_equal_models(expected / "model", two / sharding / "resumed" / "checkpoints" / "step_000003" / "model")
    resumed_run(tmp_path, two / sharding / "policy", "none")
    assert_equal_models(expected / "model", tmp_path / "checkpoints" / "step_000003" / "model")
    first, second = (
        torch.load(folder / "policy" / "checkpoints" / "step_000003" / "optimizer.pt")["state"]
        for folder in (one / "none", two / sharding)
    )
    assert first.keys() == second.keys()
    for name, state in first.items():
        assert state.keys() == second[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(type(value) is torch.Tensor for value in second[name].values())
        for moment, value in state.items():
            assert torch.allclose(value, second[name][moment], atol=1e-5), f"{name}.{moment}"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_unequal_numbers_of_trees_do_not_hang(folders, sharding):
    first, second = (torch.load(folders[1] / sharding / "measured" / f"rank_{rank}.pt") for rank in range(2))
    assert first == pytest.approx(second, nan_ok=True)
    assert first["train/ref_kl"] > 0
