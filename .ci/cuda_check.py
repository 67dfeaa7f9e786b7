"""Compile every CUDA source for every release architecture and look at what came out.

    cuda_check.py [--jobs N] [architecture ...]

Fails where ptxas spills, where a kernel that streams tensors does not load or store 16 bytes at a time (its SASS has no
such instruction), or where no kernel of a name in STREAMING is found. Needs nvcc, and cuobjdump from the toolkit or
from Triton.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "cuda-check"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
PTX = "120"  # what later GPUs compile from
# The kernels that move tensors of the size of the logits or the tokens, as patterns of their mangled names, and what
# must be 16 bytes wide there. Lb1E is the template argument true: with vectors, where the addresses allow them.
STREAMING = {
    r"sum_rows": ("LDG",),
    r"sum_pieces": ("LDG",),
    r"backward_pieces": ("LDG", "STG"),
    r"policy_loss_cuda\w+?tokens_kernel": ("LDG", "STG"),
    r"expand_rows_kernelI\w+?Lb1E": ("STG",),
    r"expand_packed_kernel": ("STG",),
}
FLAGS = ("-std=c++17", "-O3", "-lineinfo", f"-I{ROOT / 'csrc'}")


class CheckError(Exception):
    pass


def sources() -> list[Path]:
    return [path for path in sorted((ROOT / "csrc").glob("*_cuda.cu")) if path.stem != "device_cuda"]


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = util.find_spec("triton")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    raise CheckError("cuobjdump is neither on the PATH nor in an installed Triton")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


def wide_accesses(sass: str) -> dict[str, Counter[str]]:
    """Mangled kernel name -> number of loads (LDG) and stores (STG) of 16 bytes or more in global memory."""
    accesses: dict[str, Counter[str]] = {}
    name = ""
    for line in sass.splitlines():
        if header := re.match(r"\s*Function : (\S+)", line):
            name = header[1]
            accesses[name] = Counter()
        elif found := re.search(r"\b(LDG|STG)\S*\.(?:128|256)\b", line):
            accesses[name][found[1]] += 1
    return accesses


def narrow_streams(accesses: Mapping[str, Counter[str]], streaming: Mapping[str, Iterable[str]]) -> list[str]:
    """ "kernel: instruction", where a streaming kernel has none of that width."""
    return [
        f"{name}: {instruction}"
        for name, counts in accesses.items()
        for pattern, instructions in streaming.items()
        if re.search(pattern, name)
        for instruction in instructions
        if not counts[instruction]
    ]


def check(source: Path, architecture: str) -> tuple[str, list[str]]:
    """One line about the kernels of a source, and their names."""
    cubin = OUTPUT / f"{source.stem}.sm_{architecture}.cubin"
    options = (f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v,-warn-spills,-Werror")
    report = run("nvcc", *FLAGS, *options, "-o", cubin, source).stderr
    accesses = wide_accesses(run(cuobjdump(), "--dump-sass", cubin).stdout)
    if narrow := narrow_streams(accesses, STREAMING):
        raise CheckError(f"{source.name} for sm_{architecture}: no access of 16 bytes in {', '.join(narrow)}")
    registers = max((int(count) for count in re.findall(r"Used (\d+) registers", report)), default=0)
    total = sum(accesses.values(), Counter())
    line = f"{source.name} sm_{architecture}: {len(accesses)} kernels, at most {registers} registers, no spills"
    return f"{line}, {total['LDG']} loads and {total['STG']} stores of 16 bytes", list(accesses)


def check_ptx(source: Path) -> tuple[str, list[str]]:
    run("nvcc", *FLAGS, f"-arch=compute_{PTX}", "-ptx", "-o", OUTPUT / f"{source.stem}.compute_{PTX}.ptx", source)
    return f"{source.name} compute_{PTX}: PTX", []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cuda_check.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architectures", nargs="*", help=f"default: {' '.join(ARCHITECTURES)} and PTX for {PTX}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    try:
        cuobjdump()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            jobs = [pool.submit(check, s, a) for s in sources() for a in arguments.architectures or ARCHITECTURES]
            jobs += [pool.submit(check_ptx, s) for s in sources() if not arguments.architectures]
            for job in jobs:
                line, kernels = job.result()
                print(line, flush=True)
                seen.update(kernels)
        if missing := [pattern for pattern in STREAMING if not any(re.search(pattern, name) for name in seen)]:
            raise CheckError(f"no kernel is named {', '.join(missing)}; STREAMING in {__file__} names those to look at")
    except CheckError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
