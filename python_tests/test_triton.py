"""Triton without a GPU: the op tests interpreted, and every kernel compiled ahead of time for the GPUs it is for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arpo_ext import ops
from arpo_ext.ops import _dispatch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
# Large rows, and more of the same, add nothing to what is left, and take the interpreter minutes.
LEFT_OUT = [
    "151936",
    "262144",
    "large_tiles",
    "strided and float16",
    "hostile_rows and linear and float16",
    "tells_the_same",
    "spoils and (31- or 32- or 8192-)",
    "make_up and (True-None or False-2.0 or None-True)",
    "trained_token_shows and (turn or gppo or cispo or sapo)",
    "every_form and 3000-True and (turn or token)",
    "many_blocks",
]
INTERPRETED = " and ".join(["triton", *(f"not ({what})" for what in LEFT_OUT)])
FILES = ["test_triton_kernels.py", "test_logprob_entropy.py", "test_shards.py", "test_linear_logprob_entropy.py"]
FILES.append("test_logits_stats.py")
FILES += [f"test_policy_loss{part}.py" for part in ("", "_edges", "_forms", "_gradients")]
FILES.append("test_exactness.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(_dispatch.triton_interprets(), reason="this process interprets")
def test_op_tests_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", INTERPRETED, "-p", "no:cacheprovider"]
    # The interpreter computes in numpy, which warns where infinities meet.
    command += ["-W", "ignore::RuntimeWarning", *(str(HERE / name) for name in FILES)]
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


def test_importing_the_ops_does_not_import_triton():
    code = "import sys, arpo_ext.ops; from arpo_ext.ops import available_backends; available_backends()"
    code += "; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=True)


def test_a_machine_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    assert ops.available_backends()["triton"] == "triton is not installed"
    with pytest.raises(ops.BackendError, match="backend 'triton' cannot serve this call: triton is not installed"):
        ops.entropy(torch.zeros(1, 4), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available() or _dispatch.triton_interprets(), reason="can serve here")
def test_a_machine_without_a_gpu_says_so():
    with pytest.raises(ops.BackendError, match="there is no GPU that torch can use"):
        ops.entropy(torch.zeros(1, 4), backend="triton")


# Types of the kernels' arguments; "T" is the dtype of the logits. Anything else is a number of compile time.
POINTERS = {"logits": "T", "out": "T", "labels": "i64", "mask": "i1", "counter": "i64", "running": "fp64"}
POINTERS |= dict.fromkeys(("hidden", "weight", "bias"), "T")
POINTERS |= dict.fromkeys(
    ("temperatures", "logprob", "entropy", "stats", "partials", "grad_logprob", "grad_entropy"), "fp32"
)
POINTERS |= dict.fromkeys(("logsumexp", "sum_p2", "argmax_logprob"), "fp32") | {"argmax": "i64", "firsts": "i32"}
OF_TOKENS = ("old_logprob", "advantage", "weight", "ref_logprob", "importance", "ratios", "leaf_weight")
POLICY_POINTERS = dict.fromkeys((*OF_TOKENS, "loss_out", "gradient_out", "entropy_gradient_out"), "fp32")
POLICY_POINTERS |= dict.fromkeys(("normalizer_tensor", "kl_coef_tensor", "entropy_coef_tensor", "partials"), "fp64")
POLICY_POINTERS |= dict.fromkeys(("segments", "leaf_slope", "sums_out", "clip_numbers"), "fp64")
POLICY_POINTERS |= {"group": "i64", "bounds": "i64", "misplaced": "i32", "leaf_segment": "i64", "parent": "i64"}
NUMBERS = dict.fromkeys(("temperature", "temperature_rest", "softcap"), "fp32")
NUMBERS |= dict.fromkeys(("normalizer", "kl_coef", "entropy_coef", "low", "high", "dual"), "fp32")
NUMBERS |= dict.fromkeys(("tau_positive", "tau_negative"), "fp32")
NUMBERS |= dict.fromkeys(("count", "groups", "leaves", "columns", "column"), "i64")
NUMBERS |= dict.fromkeys(("vocab", "depth", "splits", "pieces", "length", "tiles", "temperature_stride"), "i32")
STRIDES = (
    "hidden_stride",
    "weight_stride",
    "inner",
    "outer_stride",
    "inner_stride",
    "to_inner",
    "to_outer_stride",
    "to_inner_stride",
)
NUMBERS |= dict.fromkeys(("begin", "to_begin", "rows", "ignore_index", "vocab_start", "vocab_total", *STRIDES), "i64")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compiled(kernel, capability, dtype, constants, options, absent=(), multiples_of_16=(), pointers=POINTERS):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **dict.fromkeys(absent)}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name].replace("T", dtype)
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = NUMBERS[name]
            if name in multiples_of_16:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": True},
    )


def tool(name):
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not found.exists():
        pytest.skip(f"this triton brings no {name}")
    return str(found)


def local_memory(binary, tmp_path):
    """Bytes of stack and local memory a thread uses: what spilled."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return [int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]


def wide(binary, what):
    """How many 16-byte loads or stores of global memory the kernel has."""
    return len(re.findall(rf"{what}\.global[\w.:]*\.v4\.b32", binary.asm["ptx"]))


ARCHITECTURES = [(80, "fp32"), (80, "bf16"), (90, "fp32"), (90, "bf16"), (90, "fp16"), (100, "fp32"), (100, "bf16")]


@pytest.mark.skipif(_dispatch.triton_interprets(), reason="this process interprets")
@pytest.mark.parametrize(("capability", "dtype"), ARCHITECTURES)
def test_rows_compile_without_spills_and_with_16_byte_accesses(capability, dtype, tmp_path):
    from arpo_ext.ops import _triton_rows as rows
    from arpo_ext.ops import logits_stats_triton as stats
    from arpo_ext.ops import logprob_entropy_triton as kernels

    forward, backward = rows.forward_tile(DTYPES[dtype]), kernels._backward_tile(DTYPES[dtype])
    warps = {"num_warps": rows.WARPS}
    one_read = compiled(
        kernels.forward_kernel, capability, dtype, forward, warps, ("partials", "running", "temperatures")
    )
    assert set(local_memory(one_read, tmp_path)) == {0}
    assert wide(one_read, "ld") == 2 * rows.PACKS_PER_THREAD  # before the loop and in it
    for absent in (("partials", "firsts", "temperatures"), ()) if capability == 90 else ((),):
        of_stats = compiled(stats.stats_kernel, capability, dtype, forward, warps, absent)
        assert set(local_memory(of_stats, tmp_path)) == {0}
        assert wide(of_stats, "ld") == 2 * rows.PACKS_PER_THREAD
    gradient = compiled(kernels.backward_kernel, capability, dtype, backward, warps)
    assert set(local_memory(gradient, tmp_path)) == {0}
    assert (wide(gradient, "ld"), wide(gradient, "st")) == (kernels._PACKS_BACKWARD,) * 2
    if capability == 90:
        for absent in (("running",), ("partials",), ("labels", "counter", "logprob", "running", "partials", "mask")):
            variant = compiled(kernels.forward_kernel, capability, dtype, forward, warps, absent)
            assert set(local_memory(variant, tmp_path)) == {0}
            assert wide(variant, "ld") == 2 * rows.PACKS_PER_THREAD
        for absent in (("running",), ("logprob", "entropy", "stats")):
            merge = compiled(
                kernels.merge_kernel, capability, dtype, {"PIECES": rows.MOST_PIECES}, {"num_warps": 1}, absent
            )
            assert set(local_memory(merge, tmp_path)) == {0}
        merge = compiled(stats.merge_kernel, capability, dtype, {"PIECES": rows.MOST_PIECES}, {"num_warps": 1})
        assert set(local_memory(merge, tmp_path)) == {0}


@pytest.mark.skipif(_dispatch.triton_interprets(), reason="this process interprets")
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize(
    ("capability", "dtype", "rows"),
    [(80, "bf16", 128), (90, "fp32", 128), (90, "bf16", 16), (90, "bf16", 64), (90, "bf16", 128), (100, "bf16", 128)],
)
def test_products_compile_without_spills_on_tensor_cores(capability, dtype, rows, softcap, tmp_path):
    from arpo_ext.ops import linear_logprob_entropy_triton as kernels

    constants = kernels._tile(DTYPES[dtype], rows) | {"SOFTCAP": softcap}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    aligned = ("depth", "hidden_stride", "weight_stride")
    binary = compiled(kernels.fused_kernel, capability, dtype, constants, options, multiples_of_16=aligned)
    assert set(local_memory(binary, tmp_path)) == {0}
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", binary.asm["ptx"])
    assert copies
    assert set(copies) == {"0x10"}, "operands come in pieces of less than 16 bytes"
    instruction = {80: "mma.sync", 90: "wgmma" if rows >= 64 else "mma.sync", 100: "tcgen05.mma"}[capability]
    assert (instruction in binary.asm["ptx"]) == (dtype != "fp32")
    assert "tf32" not in binary.asm["ptx"]


@pytest.mark.skipif(_dispatch.triton_interprets(), reason="this process interprets")
@pytest.mark.parametrize(("capability", "clip"), [(80, 0), (90, 0), (90, 2), (90, 3), (100, 0)])
def test_the_policy_loss_compiles_without_spills_and_with_16_byte_accesses(capability, clip, tmp_path):
    from arpo_ext.ops import _triton_policy as groups
    from arpo_ext.ops import policy_loss_triton as tokens

    def binary(kernel, absent=(), **constants):
        made = compiled(
            kernel, capability, "fp32", constants, {"num_warps": 4}, absent, pointers=POINTERS | POLICY_POINTERS
        )
        assert set(local_memory(made, tmp_path)) == {0}
        return made

    form = {"CLIP": clip, "PAIRS": False, "MEAN_GRADIENT": True}
    optional = ("entropy", "ref_logprob", "importance", "group", "ratios", "entropy_gradient_out", "clip_numbers")
    of_token = form | {"PACKED": False, "FULL": True, "BLOCK": tokens._BLOCK}
    usual = binary(tokens.tokens_kernel, optional, KL=0, **of_token)
    packs = tokens._BLOCK // (4 * 128)
    assert (wide(usual, "ld"), wide(usual, "st")) == (4 * packs, packs)
    everything = binary(tokens.tokens_kernel, KL=3, **of_token)
    assert (wide(everything, "ld"), wide(everything, "st")) == (7 * packs, 2 * packs)
    if capability == 90:
        binary(tokens.tokens_kernel, optional, KL=0, **{**of_token, "PAIRS": True})
        binary(groups.groups_kernel, ("segments",), **form, BLOCK=tokens._GROUP_BLOCK)
        binary(groups.leaves_kernel, CLIP=clip, BLOCK=tokens._LEAF_BLOCK)
        binary(groups.segments_kernel, BLOCK=tokens._LEAF_BLOCK)
        binary(groups.bounds_kernel, BLOCK=tokens._BLOCK)


@pytest.mark.skipif(_dispatch.triton_interprets(), reason="this process interprets")
def test_no_value_of_a_number_makes_another_binary():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from arpo_ext.ops import _triton_policy as policy
    from arpo_ext.ops import linear_logprob_entropy_triton as linear
    from arpo_ext.ops import logits_stats_triton as stats
    from arpo_ext.ops import logprob_entropy_triton as kernels
    from arpo_ext.ops import policy_loss_triton as loss

    of_policy = (policy.bounds_kernel, policy.groups_kernel, policy.leaves_kernel, policy.segments_kernel)
    of_policy = (*of_policy, loss.tokens_kernel, loss.finish_kernel)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for kernel in (
        kernels.forward_kernel,
        kernels.merge_kernel,
        kernels.backward_kernel,
        stats.stats_kernel,
        stats.merge_kernel,
        linear.fused_kernel,
        *of_policy,
    ):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        keys = set()
        for integer, number in ((1, 1.0), (16, 0.7), (3, 1e-3), (2**31 - 1, 2.0)):
            arguments = {
                name: integer if NUMBERS[name][0] == "i" else number for name in kernel.arg_names if name in NUMBERS
            }
            # D and the strides of the operands decide how wide their loads are.
            arguments |= dict.fromkeys({"depth", "hidden_stride", "weight_stride"} & arguments.keys(), 64)
            rest = {name: None for name in kernel.arg_names if name not in NUMBERS}
            keys.add(str(bind(**arguments, **rest)[1]))
        assert len(keys) == 1, keys
