"""Compiles csrc/ with the stand-ins in include/ instead of CUDA, each file once for its content."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulation"

COMPILER = os.environ.get("CXX", "g++")
# Another namespace, so that pybind11 does not take our types for those of arpo_ext._C.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-g1", "-ffp-contract=off", "-fno-math-errno"]
COMMON += ["-U_FORTIFY_SOURCE", "-Darpo=arpo_emulated", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fopenmp"]
DEFINES = ["-DARPO_HAVE_CUDA=1", '-DARPO_CUDA_VERSION="emulated"', '-DARPO_CUDA_ARCHITECTURES="90-real"']
DEFINES += ['-DARPO_COMPILER="emulated"', "-DARPO_ISA=portable", "-DARPO_ISA_portable=1"]


def missing() -> str | None:
    """Why the emulation cannot be built here; None if it can."""
    if os.uname().machine != "x86_64" and os.uname().sysname != "Linux":
        return "the emulation of CUDA runs on Linux only"
    return None if shutil.which(COMPILER) else f"no C++ compiler {COMPILER!r}"


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"no closing parenthesis for {text[start : start + 60]!r}")


def _rewrite_launches(text: str) -> str:
    """`kernel<T><<<grid, block>>>(a, b)` to `launch("kernel<T>", config(grid, block), [&](...) { ... }, a, b)`."""
    while (at := text.find("<<<")) >= 0:
        begin = at
        if text[begin - 1] == ">":  # template arguments
            depth = 0
            while True:
                begin -= 1
                depth += {">": 1, "<": -1}.get(text[begin], 0)
                if depth == 0:
                    break
        begin -= len(re.search(r"[\w:]*$", text[:begin]).group())
        kernel, config_end = text[begin:at], text.index(">>>", at)
        arguments_begin = text.index("(", config_end)
        arguments_end = _closing(text, arguments_begin)
        config, arguments = text[at + 3 : config_end], text[arguments_begin + 1 : arguments_end]
        call = f'::cuda_emulation::launch("{kernel}", ::cuda_emulation::config({config}), '
        call += (
            f"[&](const auto&... emulated) {{ {kernel}(emulated...); }}{',' if arguments.strip() else ''}{arguments})"
        )
        text = text[:begin] + call + text[arguments_end + 1 :]
    return text


_SHARED = re.compile(
    r"(?P<extern>extern\s+)?__shared__\s+(?P<align>(?:alignas|__align__)\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
    r"(?P<type>[\w:]+(?:\s*<[^;]*>)?(?:\s+[\w:]+)*?(?:\s*\*+\s*|\s+))(?P<variables>\w+\s*(?:\[[^;]*)?(?:,[^;]*)?);"
)


def _shared_variables(match: re.Match) -> str:
    found = []
    kind = match["type"].strip()
    for variable in re.split(r",(?![^\[]*\])", match["variables"]):
        name, sizes = re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])*)\s*", variable, re.DOTALL).groups()
        if match["extern"]:
            found.append(f"{kind}* {name} = static_cast<{kind}*>(::cuda_emulation::dynamic_shared());")
        else:
            found.append(
                f"static const char {name}_site = 0; auto& {name} = "
                f"::cuda_emulation::shared_variable<{kind}{sizes}>(&{name}_site);"
            )
    return " ".join(found) + "\n" * match[0].count("\n")


def _instruction(match: re.Match) -> str:
    """`asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b))` to `ptx::max_NaN_f32(r, a, b)`."""
    opcode = match["opcode"].replace(".", "_")
    operands = []
    rest = match["operands"]
    while (found := re.search(r'"[=+]?\w+"\s*\(', rest)) is not None:
        end = _closing(rest, found.end() - 1)
        operands.append(rest[found.end() : end])
        rest = rest[end + 1 :]
    return f"::cuda_emulation::ptx::{opcode}({', '.join(operands)});"


_ASM = re.compile(r'\basm\s*(?:volatile\s*)?\(\s*"\{?\s*(?P<opcode>[\w.:]+)\s[^"]*"\s*(?P<operands>:[^;]*)\)\s*;')


def rewritten(path: Path) -> str:
    """A CUDA source as plain C++, line for line."""
    text = _rewrite_launches(path.read_text(encoding="utf-8"))
    text = _ASM.sub(_instruction, _SHARED.sub(_shared_variables, text))
    return f'#line 1 "{path}"\n{text}'


def _commands(sources: Path, sanitize: bool) -> dict[str, list[str]]:
    """Object name -> compiler call without output. Kernels are watched by memory.cpp, or by the address sanitizer."""
    watch = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-threadsafe-statics"]
    common = COMMON
    if sanitize:
        watch = []
        common = [*COMMON, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    own = [f"-I{HERE / 'include'}", f"-I{HERE}"]
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    commands = {
        path.stem: [*common, *DEFINES, "-O1", *watch, f"-I{CSRC}", *own, "-xc++", str(path)]
        for path in sorted(sources.glob("*.cu"))
    }
    for path in sorted(set(CSRC.glob("*.cpp")) - {CSRC / "bindings.cpp"}):
        commands[path.stem] = [*common, *DEFINES, "-O0", f"-I{CSRC}", str(path)]
    commands["bindings"] = [*common, *DEFINES, "-O0", f"-I{CSRC}", *python, str(CSRC / "bindings.cpp")]
    for name in ("scheduler", "memory"):
        commands[name] = [*COMMON, "-O2", *own, str(HERE / f"{name}.cpp")]
    return commands


def _compile(command: list[str], output: Path) -> None:
    partial = output.with_suffix(f".{os.getpid()}.part")
    result = subprocess.run([COMPILER, *command, "-o", partial], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the emulation of CUDA does not compile:\n{' '.join(command)}\n{result.stderr}")
    partial.rename(output)


def build(*, sanitize: bool = False) -> Path:
    """The native module with emulated CUDA, compiled where its sources have changed."""
    folder = BUILD / ("sanitized" if sanitize else "plain")
    sources, objects = folder / "src", folder / "objects"
    for needed in (sources, objects):
        needed.mkdir(parents=True, exist_ok=True)
    shared = hashlib.sha256(COMPILER.encode())
    for path in sorted([*CSRC.glob("*.h"), *HERE.glob("include/*.h"), HERE / "scheduler.h", *CSRC.glob("*.cuh")]):
        shared.update(path.name.encode() + path.read_bytes())
    for stale in [*sources.glob("*.cu"), *sources.glob("*.cuh")]:
        if not (CSRC / stale.name).exists() and stale.name != "faults.cu":
            stale.unlink()
    for path in [*CSRC.glob("*.cu"), *CSRC.glob("*.cuh"), HERE / "faults.cu"]:
        text = rewritten(path)
        target = sources / path.name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")

    wanted: dict[Path, list[str]] = {}
    for name, command in _commands(sources, sanitize).items():
        content = shared.copy()
        content.update("\0".join(command).encode() + Path(command[-1]).read_bytes())
        wanted[objects / f"{name}-{content.hexdigest()[:16]}.o"] = ["-c", *command]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda item: item[0].exists() or _compile(item[1], item[0]), wanted.items()))
    for stale in set(objects.glob("*.o")) - set(wanted):
        stale.unlink()

    names = "".join(sorted(path.name for path in wanted))
    module = folder / hashlib.sha256(names.encode()).hexdigest()[:16] / "_C.so"
    if not module.exists():
        module.parent.mkdir()
        flags = ["-fsanitize=address,undefined"] if sanitize else []
        _compile(["-shared", "-fopenmp", *flags, *map(str, wanted)], module)
    return module
