"""accelerate's own FSDP2 and DeepSpeed train as one plain process does. Not yet measured."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from ranks import launch  # noqa: E402
from test_distributed import save, start, step  # noqa: E402

from arpo_ext.training import named_weights  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]


def launched_run(folder: Path, kind: str) -> None:
    config, parts, _ = start("none")
    accelerator = parts["accelerator"]
    assert kind in (accelerator.distributed_type.value.lower(), "plain")
    metrics = [step(number, config, parts) for number in range(3)]
    if kind != "deepspeed":
        save(folder, parts, 3)
    pushed = {name: tensor.cpu() for name, tensor in named_weights(accelerator.unwrap_model(parts["model"]))}
    torch.save((metrics, pushed), folder / f"rank_{accelerator.process_index}.pt")


def launched(folder, kind, flags):
    folder.mkdir()
    (folder / "run.py").write_text(
        "import pathlib, sys, test_distributed_gpu as t\nt.launched_run(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
    )
    ranks = 1 if kind == "plain" else max(1, min(2, torch.cuda.device_count()))
    launch(flags, [str(folder / "run.py"), str(folder), kind], ranks=ranks)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("fsdp", FSDP),
        ("deepspeed", ["--use_deepspeed", "--zero_stage", "2"]),
        ("deepspeed", ["--use_deepspeed", "--zero_stage", "3"]),
    ],
    ids=["fsdp2", "zero2", "zero3"],
)
def test_a_launched_wrapper_equals_one_process(tmp_path, kind, flags):
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    ((expected, weights),) = launched(tmp_path / "plain", "plain", [])
    for metrics, pushed in launched(tmp_path / kind, kind, flags):
        for own, other in zip(metrics, expected, strict=True):
            assert own == pytest.approx(other, rel=1e-3, abs=1e-5)
        assert pushed.keys() == weights.keys()
        for name, tensor in pushed.items():
            assert torch.allclose(tensor, weights[name], atol=1e-4), name
