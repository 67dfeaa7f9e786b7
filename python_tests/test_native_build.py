"""What the built native module links, loads and exports. Each check runs in a process of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arpo_ext
from arpo_ext.ops import _native

ROOT = Path(arpo_ext.__file__).parents[1]

pytestmark = pytest.mark.skipif(_native.C is None, reason=str(_native.C_MISSING))


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("ldd") is None, reason="ldd is not installed")
def test_links_neither_torch_nor_the_cuda_runtime():
    # vLLM leaves what its engines preload in the environment of whoever starts them; ldd would list that too.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    listed = subprocess.run(["ldd", _native.C.__file__], capture_output=True, text=True, check=True, env=env).stdout
    libraries = [line.split()[0] for line in listed.splitlines()]
    assert any(name.startswith("libstdc++") for name in libraries)
    assert not [name for name in libraries if re.search("torch|c10|cudart|libcuda|nvrtc", name)]


def test_imports_without_torch_and_without_a_driver():
    code = (
        "import sys; from arpo_ext import _C; info = _C.build_info(); reason = _C.cuda_unusable()\n"
        "assert 'torch' not in sys.modules\n"
        "assert info['cuda'] is None or info['cuda_architectures'], info\n"
        "assert reason is None or (isinstance(reason, str) and reason), reason\n"
        "print(sorted(_C.instruction_sets()))"
    )
    assert "portable" in run_python(code)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_serves_torch_and_us():
    code = (
        "import torch; from arpo_ext import ops\n"
        "torch.set_num_threads(2); x = torch.randn(64, 9000); ops.entropy(x); (x @ x.T).exp()\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line}\n"
        "print('\\n'.join(sorted(maps)))"
    )
    assert len(run_python(code).split()) == 1


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_code_of_an_instruction_set_stays_in_its_namespace():
    """A function the linker may share between object files must not exist with AVX instructions: SIGILL elsewhere."""
    objects = sorted((ROOT / "build" / "native").glob("CMakeFiles/arpo_avx*.dir/csrc/*.o"))
    if not objects:
        pytest.skip("no objects in build/native; `make native` leaves them there")
    for path in objects:
        listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        shared = [line.split(maxsplit=2)[2] for line in listed.splitlines() if re.match(r"[0-9a-f]+ [Wu] ", line)]
        isa = re.search("arpo_(avx[0-9]+)", str(path)).group(1)
        assert not [name for name in shared if f"arpo::{isa}::" not in name], path


def test_arguments_that_would_corrupt_memory_are_refused():
    inputs = (0, 0, 1, 4, 1, 0, 4, 0, 0, 0, 0, 1.0, -100, 0, 4)
    mistakes = (
        (1, 3, "dtype"),
        (3, 0, "column"),
        (4, 0, "inner"),
        (11, 0.0, "temperature"),
        (13, -1, "does not fit"),
        (13, 1, "4 columns from column 1 does not fit a vocabulary of 4"),
        (14, 3, "does not fit"),
    )
    for index, value, message in mistakes:
        wrong = [*inputs[:index], value, *inputs[index + 1 :]]
        with pytest.raises(ValueError, match=message):
            _native.C.LogitInputs(*wrong)
    good = _native.C.LogitInputs(*inputs)
    part = _native.C.LogitInputs(*inputs[:-1], 5)
    with pytest.raises(ValueError, match="forward needs all columns, got 4 of 5"):
        _native.C.logprob_entropy_forward(-1, 1, part, 0, 0, 0)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _native.C.logprob_entropy_forward(-1, 0, good, 0, 0, 0)
    with pytest.raises(ValueError, match="instruction set code must be -1 to 2, got 7"):
        _native.C.logprob_entropy_forward(7, 1, good, 0, 0, 0)
