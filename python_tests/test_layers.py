"""The architecture as tests: who may import what, and one word per op in every layer."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "arpo_ext"

DATA = {"types", "errors", "config", "algorithms"}
ABOVE = DATA | {"render", "data", "model", "tracking"}

# folder or module -> (ours it may import, third party it may import)
LAYERS = {
    "types": (set(), set()),
    "errors": (set(), set()),
    "algorithms": (set(), set()),
    "config": (DATA, {"yaml", "pydantic"}),
    "ops": ({"ops", "types"}, {"torch", "numpy"}),
    "render": (DATA, {"transformers"}),
    "data": (DATA, {"pyarrow", "numpy"}),
    "model": (DATA, {"transformers", "torch"}),
    "tracking": (DATA | {"tracking_services"}, {"torch", "tqdm", "yaml"}),
    "tracking_services": (DATA, set()),
    "tools": (DATA | {"tools"}, set()),
    "rewards": (DATA | {"rewards"}, set()),
    "rollout": (DATA | {"render", "data", "ops", "tools", "rollout"}, {"torch", "transformers", "numpy"}),
    "training": (ABOVE | {"ops", "training"}, {"torch", "transformers", "accelerate", "numpy", "safetensors"}),
    "evaluation": (ABOVE | {"ops", "tools", "rewards", "rollout", "evaluation"}, {"torch", "transformers"}),
    "cli": ({"*"}, {"*"}),
    "__init__": (set(), set()),
    "__main__": ({"cli"}, set()),
}

# The library a single file may import where its layer may not.
EXTRAS = {
    "ops/_triton.py": {"triton"},
    "ops/_triton_rows.py": {"triton"},
    "ops/logits_stats_triton.py": {"triton"},
    "ops/logprob_entropy_triton.py": {"triton"},
    "ops/linear_logprob_entropy_triton.py": {"triton"},
    "ops/_triton_policy.py": {"triton"},
    "ops/policy_loss_triton.py": {"triton"},
    "tools/browser.py": {"httpcore", "httpx", "trafilatura"},
    "tools/web_page.py": {"httpcore"},
    "tools/page_text.py": {"trafilatura"},
    "tools/cache.py": {"diskcache"},
    "tools/mcp_client.py": {"mcp"},
    "tools/search_bm25.py": {"bm25s", "numpy", "pyarrow"},
    "tools/search_web.py": {"httpx"},
    "rewards/math_worker.py": {"math_verify"},
    "rollout/vllm_engine.py": {"vllm"},
    "rollout/vllm_entropy.py": {"vllm"},
    "rollout/vllm_entropy_file.py": {"vllm"},
    "rollout/vllm_sampler.py": {"vllm"},
    "rollout/vllm_stepped.py": {"vllm"},
    "rollout/vllm_watch.py": {"vllm"},
    "rollout/vllm_worker.py": {"vllm"},
    "training/weights.py": {"deepspeed"},
    "evaluation/report.py": {"jinja2", "markupsafe"},
    "evaluation/report_charts.py": {"markupsafe"},
    "evaluation/report_plots.py": {"markupsafe"},
    "evaluation/report_data.py": {"yaml"},
}


def python_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "benchmarks" not in p.relative_to(PACKAGE).parts)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything the file imports; blocks under TYPE_CHECKING never run and do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    never_run = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in never_run:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["arpo_ext", *path.relative_to(PACKAGE).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} if module.startswith("arpo_ext") else {module}
    return names


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_in_their_layer(path):
    relative = path.relative_to(PACKAGE)
    layer = relative.parts[0].removesuffix(".py")
    assert layer in LAYERS, f"{relative} belongs to no layer; add it to LAYERS"
    ours, third_party = LAYERS[layer]
    third_party = third_party | EXTRAS.get(relative.as_posix(), set())
    for name in imported_modules(path):
        top, _, rest = name.partition(".")
        if top == "arpo_ext":
            part = rest.partition(".")[0]
            assert part in ours or "*" in ours or part in ("__version__", "_C"), f"{relative} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in third_party or "*" in third_party, f"{relative} imports {name}"


def test_only_one_file_imports_the_native_module():
    importers = [
        path.relative_to(PACKAGE).as_posix()
        for path in python_files()
        if any(name.split(".")[:2] == ["arpo_ext", "_C"] for name in imported_modules(path))
    ]
    assert importers == ["ops/_native.py"]


def test_native_code_never_includes_torch_and_pybind_stays_in_bindings():
    for path in sorted((ROOT / "csrc").iterdir()):
        text = path.read_text(encoding="utf-8")
        assert "torch/" not in text, f"{path.name} includes torch"
        assert "ATen/" not in text, f"{path.name} includes torch"
        if path.name != "bindings.cpp":
            assert "pybind11/" not in text, f"{path.name} includes pybind11; only bindings.cpp may"


def ops() -> list[str]:
    suffixes = ("_reference", "_triton")
    return sorted(
        path.stem
        for path in (PACKAGE / "ops").glob("*.py")
        if not path.stem.startswith("_") and not path.stem.endswith(suffixes)
    )


# The matrix products are torch's, and what sums up their tiles is logprob_entropy's.
WITHOUT_NATIVE = {"linear_logprob_entropy"}
# The token-level form of branch_points is timed beside it.
BENCHED_WITH = {"branch_tokens": "branch_points"}


@pytest.mark.parametrize("op", ops())
def test_an_op_has_its_file_in_every_layer(op):
    native = [f"csrc/{op}{suffix}" for suffix in (".h", "_cpu.cpp", "_cuda.cu")]
    if op in WITHOUT_NATIVE:
        assert not [name for name in native if (ROOT / name).exists()]
        native = []
    expected = [
        *native,
        f"arpo_ext/ops/{op}.py",
        f"arpo_ext/ops/{op}_reference.py",
        f"python_tests/test_{op}.py",
        f"benchmarks/bench_{BENCHED_WITH.get(op, op)}.py",
    ]
    assert not [name for name in expected if not (ROOT / name).is_file()]


def test_every_native_source_belongs_to_an_op_or_the_skeleton():
    skeleton = {
        "bindings.cpp",
        "check.h",
        "huge_pages.h",
        "huge_pages.cpp",
        "kept_memory.h",
        "kept_memory.cpp",
        "dtype.h",
        "isa.h",
        "isa.cpp",
        "host_device.h",
    }
    skeleton |= {"vec.h", "vec_avx512.h", "vec_avx2.h", "vec_portable.h"}
    skeleton |= {"logit_rows.h", "row_sums.h", "row_sums.cuh", "row_kernels.cuh"}
    skeleton |= {f"policy_loss_{part}.{suffix}" for part in ("tokens", "groups") for suffix in ("h", "cuh")}
    skeleton |= {"segment_advantages.h", "segment_advantages_cpu.cpp", "segment_advantages_cuda.cu"}
    skeleton |= {"cuda_utils.cuh", "device_cuda.h", "device_cuda.cu"}
    known = {f"{op}{suffix}" for op in ops() for suffix in (".h", "_cpu.cpp", "_cuda.cu")}
    assert not {path.name for path in (ROOT / "csrc").iterdir()} - skeleton - known


def test_the_oracle_shares_no_code_with_what_it_checks():
    for path in (PACKAGE / "ops").glob("*_reference.py"):
        ours = {name for name in imported_modules(path) if name.startswith("arpo_ext")}
        assert all(name.startswith("arpo_ext.types") for name in ours), f"{path.name} imports {ours}"
