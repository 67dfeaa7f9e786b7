"""What `make` would run on machines that are not this one, and how `make cuda-check` reads what was compiled."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cuda_check():
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / ".ci" / "cuda_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_gpu_check_runs_tests_sanitizers_and_benchmarks_without_a_network():
    done = subprocess.run(["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = re.sub(r"\\\n\s*", "", done.stdout)
    mark = "pytest.mark." + "gpu"  # in two parts: this file has none
    tested = {path.name for path in ROOT.glob("python_tests/test_*.py") if mark in path.read_text("utf-8")}
    runs = [line for line in commands.splitlines() if "-m pytest -m gpu" in line]
    launched = {name for name in tested if name.endswith("_gpu.py")}
    assert launched
    training = runs.pop(1)
    assert {Path(word).name for word in training.split() if word.endswith(".py")} == launched
    for line in runs:
        assert {Path(word).name for word in line.split() if word.endswith(".py")} == tested - launched
    tools = [re.search(r"--tool (\w+)", line) for line in runs]
    assert [tool[1] if tool else None for tool in tools] == [
        None, "memcheck", "memcheck", "racecheck", "synccheck", "initcheck"
    ]  # fmt: skip
    assert all("--error-exitcode 1" in line for line in runs[1:])
    assert "-m benchmarks --device cuda --json benchmarks/results/ops_gpu.json" in commands
    assert not re.search(r"\bpip\b|https?:|\.venv/\.ready", commands)


SASS = """
	code for sm_90
		Function : _ZN4arpo8sum_rowsIfEEv
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E R8, desc[UR4][R2.64] ;
		Function : _ZN4arpo8sum_rowsI6__halfEEv
        /*0010*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
		Function : _ZN4arpo12merge_piecesIfEEv
        /*0010*/                   LDS.128 R4, [R2] ;
		Function : _ZN4arpo15backward_piecesIfEEv
        /*0010*/                   LDG.E.ENL2.256.CONSTANT R4, R8, desc[UR4][R2.64] ;
        /*0020*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
"""


def test_cuda_check_counts_wide_accesses_by_kernel_and_names_streams_without(cuda_check):
    accesses = cuda_check.wide_accesses(SASS)
    assert [dict(counts) for counts in accesses.values()] == [{"LDG": 1}, {}, {}, {"LDG": 1, "STG": 1}]
    streaming = {"sum_rows": ("LDG",), "backward_pieces": ("LDG", "STG")}
    assert cuda_check.narrow_streams(accesses, streaming) == ["_ZN4arpo8sum_rowsI6__halfEEv: LDG"]
    both = cuda_check.narrow_streams(accesses, {"sum_rowsIf": ("LDG", "STG")})
    assert both == ["_ZN4arpo8sum_rowsIfEEv: STG"]


def test_cuda_check_looks_at_kernels_that_exist(cuda_check):
    text = "".join(path.read_text("utf-8") for path in (ROOT / "csrc").glob("*.cu*"))
    names = [re.search(r"[a-z_]+(?=$|I)", pattern)[0] for pattern in cuda_check.STREAMING]
    assert not [name for name in names if not re.search(rf"\b{name}\(", text)]
    assert {path.stem for path in cuda_check.sources()} >= {"logprob_entropy_cuda", "branch_points_cuda"}


def test_cuda_check_compiles_for_what_a_release_holds(cuda_check):
    release = re.search(
        r'"release"\)\n\s*set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)', (ROOT / "CMakeLists.txt").read_text()
    )
    expected = [f"{arch}-real" for arch in cuda_check.ARCHITECTURES] + [f"{cuda_check.PTX}-virtual"]
    assert release[1].split() == expected
