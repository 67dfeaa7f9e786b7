"""The Python tool under attack, started by root and by an ordinary user: nothing gets out, nothing is harmed."""

import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sandbox_attacks import ATTACKS, SECRET

from arpo_ext.config import PythonToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.tools import python_server
from arpo_ext.tools.python_sandbox import PythonTool
from arpo_ext.tools.sandbox import syscalls

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64",
    reason="the attacks name system calls of Linux on x86_64",
)

PROJECT = Path(__file__).parents[1]
ORDINARY = 54_321


@pytest.fixture(scope="module", params=["root", "ordinary user"])
def report(request):
    """What the attack program says at its end."""
    is_root = os.getuid() == 0
    if request.param == "root" and not is_root:
        pytest.skip("needs root")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "outside").mkdir()
        command = [sys.executable, str(PROJECT / "python_tests" / "sandbox_attacks.py"), str(folder / "outside")]
        if request.param == "ordinary user" and is_root:
            os.chown(folder / "outside", ORDINARY, ORDINARY)
            command = as_ordinary_user(command, folder)
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=280)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if "refused" in said:
        pytest.skip(said["refused"])
    return said


def as_ordinary_user(command, folder):
    """`command` without privileges, in a mount namespace where the interpreter and the project can be reached.

    Often they lie in root's home. A folder on the way that only its owner may enter is covered by an empty one, which
    shows nothing but what is needed.
    """
    if not all(map(shutil.which, ("unshare", "setpriv", "mount"))):
        pytest.skip("needs unshare, setpriv and mount, to give privileges up")
    trees = {Path(p).resolve() for p in (sys.base_prefix, sys.prefix, PROJECT)}
    hidden = {tree: closed for tree in trees for closed in [closed_folder(tree)] if closed is not None}
    held = {tree: folder / f"held{i}" for i, tree in enumerate(hidden)}
    lines = ["set -e"]
    lines += [f"mkdir {q(hold)}; mount --rbind {q(tree)} {q(hold)}" for tree, hold in held.items()]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {q(closed)}" for closed in set(hidden.values())]
    lines += [f"mkdir -p {q(tree)}; mount --rbind {q(hold)} {q(tree)}" for tree, hold in held.items()]
    lines.append(f"exec setpriv --reuid {ORDINARY} --regid {ORDINARY} --clear-groups {shlex.join(command)}")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"cannot make a mount namespace: {probe.stderr.strip()}")
    return ["unshare", "-m", "sh", "-c", "\n".join(lines)]


def closed_folder(path):
    """The outermost folder above `path` that others may not enter."""
    return next((p for p in [*reversed(path.parents), path] if not p.stat().st_mode & stat.S_IXOTH), None)


def q(path):
    return shlex.quote(str(path))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained_and_the_next_call_works(report, name):
    answer = report["answers"][name]
    assert re.search(ATTACKS[name][1], answer["text"]), answer["text"]
    assert answer["next"] == "42"


def test_the_program_that_was_attacked_is_unharmed(report):
    assert report["visits"] == []
    assert report["outside"] == ["secret", "socket"]
    assert (report["secret"], report["limits"], report["signals"]) == (SECRET, report["limits_before"], [])


def test_no_attack_saw_the_secret(report):
    assert SECRET not in json.dumps(report["answers"])


def test_the_identity_is_the_one_asked_for(report, request):
    assert report["missing"] == {} or set(report["missing"]) == {"landlock"}
    ordinary = "ordinary user" in request.node.name
    assert (report["uid"] != 0) == ordinary
    assert report["capabilities"] != 0 or ordinary


HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize("column", [0, 1], ids=["x86_64", "aarch64"])
def test_the_filter_refuses_the_calls_it_names(column):
    header = Path(HEADERS[column])
    if not header.is_file():
        pytest.skip(f"needs {header}")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    for name, known in syscalls._REFUSED.items():
        if known[column] is not None:
            assert int(numbers[name]) == known[column], name
    for name in ("clone", "clone3", "socket"):
        assert int(numbers[name]) == getattr(syscalls, f"_{name.upper()}")[column]


def test_a_kernel_without_the_filter_is_named(monkeypatch):
    patch = "; import sandbox.syscalls as s; s._MACHINES = {}; main("
    monkeypatch.setattr(python_server, "LAUNCH", python_server.LAUNCH.replace("; main(", patch))
    with pytest.raises(ToolError, match=r"lacks system call filter \(seccomp: system calls are not known on x86_64"):
        PythonTool(PythonToolConfig()).start()
