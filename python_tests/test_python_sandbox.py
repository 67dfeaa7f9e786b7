"""The Python tool: what code gets to see and use, what it is denied, and that nothing of it stays behind."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arpo_ext.config import PythonToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.tools import python_sandbox, python_server
from arpo_ext.tools.python_sandbox import NO_OUTPUT, PythonTool
from arpo_ext.tools.python_server import ServerLost

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")


def started(**settings):
    tool = PythonTool(PythonToolConfig(**settings))
    try:
        tool.start()
    except ToolError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(str(error))
    return tool


@pytest.fixture(scope="module")
def tool():
    tool = started(timeout_s=10, output_chars=1000)
    yield tool
    tool.close()


@pytest.fixture(scope="module")
def hasty_tool():
    tool = started(timeout_s=1, memory_mb=256, output_chars=1000)
    yield tool
    tool.close()


def run(tool, code):
    return tool.run(textwrap.dedent(code))


def wait_until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print(47 + 12)", "59"),
        ("47 + 12", "59"),
        ("x = 6\nx * 7", "42"),
        ("'a' + 'b'", "ab"),
        ("print(1)\nprint(2)", "1\n2"),
        ("print(1)\n2", "1\n2"),
        ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nf(20)", "2432902008176640000"),
        ("import math, fractions\nfractions.Fraction(1, 3) + math.comb(4, 2)", "19/3"),
        ("__name__", "__main__"),
        (" print(1)\n print(2)", "1\n2"),
        ("```python\nprint(5)\n```", "5"),
        ("'Straße 東京 🦊'", "Straße 東京 🦊"),
        ("import sys; sys.stdout.buffer.write(b'\\xff!'); None", "\ufffd!"),
        ("print('\\ud800')", "\\ud800"),
        ("import sys; print('note', file=sys.stderr); 3", "3"),
        ("import sys; print('note', file=sys.stderr)", "note"),
        ("import threading; threading.Thread(target=lambda: print('thread')).start()", "thread"),
        ("import atexit; atexit.register(print, 'end'); None", "end"),
        ("print('before'); exit()", "before"),
        ("import sys; sys.exit(0)", NO_OUTPUT),
        ("x = 1", NO_OUTPUT),
        ("None", NO_OUTPUT),
        ("import os; os._exit(0)", NO_OUTPUT),
    ],
)
def test_what_code_gives(tool, code, text):
    result = tool.run(code)
    assert (result.text, result.ok) == (text, True)


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x ==", "SyntaxError: invalid syntax"),
        ("if True:\nx", "IndentationError: expected an indented block after 'if' statement on line 1"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import sys; sys.exit('no')", "no"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", "stopped by SIGKILL"),
        ("import os; os.kill(os.getpid(), 15)", "stopped by SIGTERM"),
        ("import os; os.abort()", "stopped by SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "stopped by SIGSEGV"),
        ("import torch", "ModuleNotFoundError: No module named 'torch'"),
        ("import arpo_ext", "ModuleNotFoundError: No module named 'arpo_ext'"),
        ("print(1)\nimport sandbox", "ModuleNotFoundError: No module named 'sandbox'"),
        ("x = 10 ** 5000; print(x)", "ValueError: Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_what_fails(tool, code, end):
    result = tool.run(code)
    assert not result.ok
    assert result.text.split("\n")[-1].startswith(end)


def test_a_traceback_is_short_and_shows_the_code(tool):
    result = run(
        tool,
        """\
        import json
        def load(text):
            return json.loads(text)
        print("first")
        load("{")
        """,
    )
    assert not result.ok
    assert result.text.split("\n")[:3] == [
        "first",
        "Traceback (most recent call last):",
        '  File "<python>", line 5, in <module>',
    ]
    assert "return json.loads(text)" in result.text
    assert "decoder.py" not in result.text
    deep = run(tool, "def f(n):\n    return g(n)\ndef g(n):\n    return f(n + 1)\nf(0)")
    assert len(deep.text) < 800
    assert deep.text.endswith("RecursionError: maximum recursion depth exceeded")


def test_empty_code_is_a_failure(tool):
    assert not tool.run(" \n ").ok


def test_calls_share_nothing(tool):
    assert run(tool, "import builtins, random; builtins.left = 1; x = 2; open('/tmp/left', 'w').write('x'); 0").ok
    assert "NameError" in run(tool, "left").text
    assert "NameError" in run(tool, "x").text
    assert run(tool, "import os; os.listdir('.')").text == "[]"
    assert run(tool, "import random; random.random()").text != run(tool, "import random; random.random()").text


def test_hashes_of_strings_do_not_vary(tool):
    other = started()
    try:
        assert tool.run("hash('a')").text == other.run("hash('a')").text
    finally:
        other.close()


def test_endless_loop_and_sleep_are_stopped(hasty_tool):
    for code in ("while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()"):
        start = time.monotonic()
        result = hasty_tool.run(f"print('so far')\n{code}")
        assert time.monotonic() - start < 4
        assert not result.ok
        assert result.text == "so far\nTimeoutError: stopped after 1 s"


def test_signals_cannot_be_kept_off(hasty_tool):
    code = """\
        import signal
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
        """
    assert run(hasty_tool, code).text.startswith("TimeoutError")


def test_a_process_tree_ends_with_the_call(tool):
    code = """\
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
        else:
            print("parent")
        """
    start = time.monotonic()
    assert run(tool, code).text == "parent"
    assert time.monotonic() - start < 5
    only_ready_ones_left(tool)


def only_ready_ones_left(tool):
    """No process below the server but, of each worker and a spare one, supervisor, first process and waiting code."""
    server = tool._server._process.pid
    wait_until(lambda: len(descendants(server)) == 3 * (tool.workers + 1))


def test_a_fork_bomb_is_held(hasty_tool):
    code = """\
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """
    assert "TimeoutError" in run(hasty_tool, code).text
    counted = """\
        import os, time
        made = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(600)
                made += 1
        except OSError as error:
            print(made, type(error).__name__)
        """
    assert run(hasty_tool, counted).text == "15 BlockingIOError"


def test_a_memory_bomb_is_an_error_of_its_own(hasty_tool):
    assert hasty_tool.run("x = bytearray(1 << 30)").text.endswith("MemoryError")
    assert "MemoryError" in hasty_tool.run("x = []\nwhile True:\n    x.append(bytes(1 << 20))").text
    assert hasty_tool.run("len(bytearray(64 << 20))").ok


def test_the_memory_of_all_processes_is_bounded(tool):
    code = """\
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                break
        kept = [b"x" * (16 << 20) for _ in range(22)]
        time.sleep(60)
        """
    result = run(tool, code)
    assert result.text == "MemoryError: stopped, its processes together held too much memory"
    assert run(tool, code.replace("range(4)", "range(1)").replace("sleep(60)", "sleep(0.3)")).ok


def test_files_are_limited(tool):
    assert "OSError" in run(tool, "with open('big', 'wb') as f:\n    f.write(bytes(17 << 20))").text
    code = "for i in range(9):\n    with open(str(i), 'wb') as f:\n        f.write(bytes(8 << 20))"
    assert "No space left" in run(tool, code).text
    assert "Too many open files" in run(tool, "files = [open('/dev/null') for _ in range(100)]").text


def test_shared_memory_that_outlives_processes_is_switched_off(tool):
    code = """\
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600))
        """
    assert run(tool, code).text == "-1 -1"


def test_a_gigabyte_of_output_is_cut(tool):
    code = """\
        import os
        print("start")
        chunk = b"x" * (1 << 20)
        for _ in range(1024):
            os.write(1, chunk)
        print("\\nend")
        """
    result = run(tool, code)
    assert result.ok, result.text
    assert len(result.text) <= 1000
    assert result.text.startswith("start\nxxx")
    assert result.text.endswith("xxx\nend")
    assert f"[cut: {len('start') + (1 << 30) + len('end') + 3} bytes in all]" in result.text


def test_a_failure_after_much_output_still_shows_the_error(tool):
    result = tool.run("print('x' * 100_000)\n1 / 0")
    assert len(result.text) <= 1000
    assert result.text.endswith("ZeroDivisionError: division by zero")


def test_there_is_no_network(tool):
    code = """\
        import socket
        for address in ("127.0.0.1", "192.0.2.1"):
            try:
                socket.create_connection((address, 80), timeout=2)
            except OSError as error:
                print(type(error).__name__)
        try:
            socket.getaddrinfo("example.org", 80)
        except OSError:
            print("no names")
        """
    lines = run(tool, code).text.split("\n")
    assert len(lines) == 3
    assert set(lines[:2]) <= {"OSError", "PermissionError"}
    assert lines[2] == "no names"


def test_a_listening_parent_is_not_reachable(tool):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = tool.run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")
    assert not result.ok


def test_files_of_the_machine_are_not_there(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "parent")
    secret = tmp_path / "secret"
    secret.write_text("parent")
    tmp_path.chmod(0o777)
    for path in (secret, "/etc/passwd", "/proc/self/environ", "/bin/sh", "/home", Path(__file__)):
        assert "FileNotFoundError" in tool.run(f"open({str(path)!r})").text
    assert run(tool, "import os; dict(os.environ), os.getenv('SECRET')").text == "({}, None)"
    assert "/tmp" in run(tool, "import os; os.getcwd()").text


def test_only_the_private_folder_can_be_written(tool):
    code = """\
        import os, sys
        for folder in ("/", "/dev", "/lib", "/usr/lib", os.path.dirname(os.__file__)):
            try:
                open(f"{folder}/new", "w")
            except OSError as error:
                print(type(error).__name__)
        open("/dev/null", "w").write("x")
        open("/tmp/a", "w").write("text")
        os.mkdir("b"), os.rename("a", "b/a"), os.symlink("b/a", "c")
        print(open("c").read())
        """
    lines = run(tool, code).text.split("\n")
    assert set(lines[:-1]) <= {"OSError", "PermissionError"}
    assert len(lines) == 6
    assert lines[-1] == "text"


def test_identity_and_privileges(tool):
    code = """\
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        print(os.getuid() >= 1000 and os.getuid() == os.geteuid() == os.getgid(), os.getpid() <= 2)
        for flag in (0x10000000, 0x20000, 0x40000000):
            print(libc.unshare(flag))
        print(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"))
        print(libc.prctl(39, 0, 0, 0, 0))
        for call in (lambda: os.setuid(0), lambda: os.kill(1, 9)):
            try:
                call()
            except PermissionError:
                print("refused")
            except OSError:
                print("unmapped")
        """
    lines = run(tool, code).text.split("\n")
    assert lines[0] == "True True"
    assert lines[1:4] == ["-1"] * 3
    assert lines[4] == "-1 -1"
    assert lines[5] == "1"
    assert lines[6] in ("refused", "unmapped")
    assert lines[7] == "refused"


def test_descriptors_are_closed(tool):
    code = """\
        import os
        found = []
        for fd in range(32):
            try:
                os.fstat(fd)
                found.append(fd)
            except OSError:
                pass
        print(found)
        """
    assert run(tool, code).text == "[0, 1, 2]"


def test_many_calls_at_once():
    tool = started(workers=4, timeout_s=20)
    try:
        start = time.monotonic()
        with ThreadPoolExecutor(8) as threads:
            texts = list(threads.map(lambda i: tool.run(f"{i} ** 2").text, range(80)))
        assert texts == [str(i * i) for i in range(80)]
        assert time.monotonic() - start < 20
        with ThreadPoolExecutor(4) as threads:
            uids = set(threads.map(lambda i: tool.run("import os, time; time.sleep(0.3); os.getuid()").text, range(4)))
        assert len(uids) == (4 if os.getuid() == 0 else 1)
    finally:
        tool.close()


def test_a_dead_server_is_replaced(tool, caplog):
    before = tool._server._process.pid
    os.kill(before, signal.SIGKILL)
    assert tool.run("1 + 1").text == "2"
    assert tool._server._process.pid != before
    assert "starting another" in caplog.text


def test_a_server_that_is_still_ending_is_not_asked_again(tool, monkeypatch):
    def broken(call, request, timeout_s):
        threading.Timer(0.1, os.kill, (server._process.pid, signal.SIGKILL)).start()
        raise ServerLost("Connection reset by peer")

    server = tool._server
    monkeypatch.setattr(server, "call", broken)
    assert tool.run("1 + 1").text == "2"
    assert tool._server is not server


def test_a_server_that_dies_during_a_call():
    tool = started(timeout_s=20)
    try:
        with ThreadPoolExecutor(1) as threads:
            pending = threads.submit(tool.run, "import time; time.sleep(1); print('again')")
            time.sleep(0.3)
            os.kill(tool._server._process.pid, signal.SIGKILL)
            assert pending.result().text == "again"
    finally:
        tool.close()


def test_close_ends_a_running_call_and_the_server():
    tool = started(timeout_s=60)
    server = tool._server._process
    with ThreadPoolExecutor(1) as threads:
        pending = threads.submit(tool.run, "import time; time.sleep(50)")
        time.sleep(0.3)
        start = time.monotonic()
        tool.close()
        tool.close()
        result = pending.result(timeout=5)
    assert time.monotonic() - start < 5
    assert not result.ok
    assert "closed" in result.text
    assert server.returncode is not None
    with pytest.raises(ToolError, match="not started"):
        tool.run("1")


def test_nothing_outlives_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""\
        import threading, time
        from arpo_ext.config import PythonToolConfig
        from arpo_ext.tools.python_sandbox import PythonTool
        tool = PythonTool(PythonToolConfig(timeout_s=100, sandbox="best_effort"))
        tool.start()
        threading.Thread(target=tool.run, args=("import time; time.sleep(90)",)).start()
        time.sleep(0.5)
        print(tool._server._process.pid, flush=True)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(python_sandbox.__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as parent:
        server = int(parent.stdout.readline())
        group = [server, *descendants(server)]
        assert len(group) >= 3
        parent.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in group))


def descendants(pid):
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [d for child in children for d in descendants(child)]


def test_a_server_that_cannot_start_is_a_tool_error(monkeypatch):
    monkeypatch.setattr(python_server, "LAUNCH", "raise SystemExit('no luck')")
    with pytest.raises(ToolError, match="did not start: no luck"):
        PythonTool(PythonToolConfig()).start()


def test_a_missing_mechanism(monkeypatch, caplog):
    launch = python_server.LAUNCH.replace(
        "; main(",
        "; import sandbox.kernel as k; real = k.unshare\n"
        "def refuse(flags, what):\n"
        "    if flags & k.NEWNET: raise OSError(1, 'not today')\n"
        "    real(flags, what)\n"
        "k.unshare = refuse; main(",
    )
    monkeypatch.setattr(python_server, "LAUNCH", launch)
    with pytest.raises(ToolError, match=r"network namespace \(not today\).*best_effort"):
        PythonTool(PythonToolConfig()).start()
    tool = PythonTool(PythonToolConfig(sandbox="best_effort"))
    tool.start()
    try:
        assert "network namespace" in tool.missing
        assert "without network namespace (not today)" in caplog.text
        assert tool.run("1").text == "1"
    finally:
        tool.close()


PROBE = """
import sys, time
from arpo_ext.config import PythonToolConfig
from arpo_ext.tools import python_server
from arpo_ext.tools.python_sandbox import PythonTool
if sys.argv[2:] == ["no landlock"]:
    patch = "; import sandbox.kernel as k; k.landlock_version = lambda: k._syscall(-1, 'Landlock'); main("
    python_server.LAUNCH = python_server.LAUNCH.replace("; main(", patch)
tool = PythonTool(PythonToolConfig(timeout_s=1, sandbox=sys.argv[1]))
tool.start()
print(sorted(tool.missing))
for code in (
    "6 * 7",
    "import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    time.sleep(77)\\nprint('forked')",
    "while True: pass",
    "open('/etc/passwd')",
    "open('note', 'w').write('x'), open('note').read()",
    "import ctypes; ctypes.CDLL(None).unshare(0x20000)",
    "open('/new', 'w')",
    "open('/usr/lib/new', 'w')",
    "import os; deep = '/'.join(['d'] * 900)\\nfor _ in range(2): os.makedirs(deep); os.chdir(deep)",
    "import os; os.makedirs('a/b'); open('a/f', 'w'); os.chmod('a/b', 0); os.chmod('a', 0); os.symlink('/', 'l')"
    "\\nos.getcwd()",
):
    start = time.monotonic()
    print(repr(tool.run(code).text.split("\\n")[-1]), time.monotonic() - start < 5)
tool.close()
"""


def run_with_capabilities(capabilities, *arguments):
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to give privileges up")
    command = ["setpriv", "--inh-caps=-all", f"--bounding-set=-all{capabilities}", sys.executable, "-c", PROBE]
    environment = {**os.environ, "PYTHONPATH": str(Path(python_sandbox.__file__).parents[2])}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout.strip().split("\n"), done.stderr


def test_without_privileges_a_user_namespace_gives_everything(tool):
    lines, errors = run_with_capabilities(",+setfcap", "required")
    if "lacks" in errors:
        pytest.skip(errors.strip().rpartition("\n")[2])
    assert lines[:4] == ["[]", "'42' True", "'forked' True", "'TimeoutError: stopped after 1 s' True"], errors
    assert "FileNotFoundError" in lines[4]
    assert lines[5:7] == ["\"(1, 'x')\" True", "'-1' True"]


def test_the_root_is_read_only_without_landlock_too(tool):
    lines, errors = run_with_capabilities(",+setfcap", "required", "no landlock")
    if "lacks" in errors:
        pytest.skip(errors.strip().rpartition("\n")[2])
    assert lines[0] == "['landlock']"
    assert [line.count("Read-only file system") for line in lines[7:9]] == [1, 1], lines


def test_where_namespaces_are_refused():
    _, errors = run_with_capabilities(",+setuid,+setgid", "required")
    assert "ToolError: the python tool's sandbox lacks" in errors
    lines, errors = run_with_capabilities(",+setuid,+setgid,+kill,+chown,+dac_override", "best_effort")
    missing = ["ipc namespace", "network namespace", "pid namespace", "private root"]
    assert lines[0] in (str(missing), str(sorted([*missing, "landlock"]))), errors
    assert lines[1:3] == ["'42' True", "'forked' True"]
    assert lines[3] == "'TimeoutError: stopped after 1 s' True"
    if "landlock" not in lines[0]:
        assert "PermissionError" in lines[4]
    assert lines[5:7] == ["\"(1, 'x')\" True", "'-1' True"]
    assert ["PermissionError" in line for line in lines[7:9]] == [True, True]
    folder = Path(lines[10].split("'")[1])
    assert folder.name.startswith("arpo-python-")
    wait_until(lambda: not list(folder.parent.glob("arpo-python-*")))


def test_start_from_a_thread_that_ends():
    tools = []
    thread = threading.Thread(target=lambda: tools.append(started()))
    thread.start()
    thread.join()
    (tool,) = tools
    try:
        time.sleep(0.2)
        server = tool._server._process.pid
        assert tool.run("2").text == "2"
        assert tool._server._process.pid == server
    finally:
        tool.close()


@pytest.fixture(scope="module")
def numeric_tool():
    pytest.importorskip("sympy")
    tool = started(timeout_s=10, memory_mb=128, packages=["numpy", "sympy"])
    yield tool
    tool.close()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import numpy as np; float(np.linalg.norm(np.array([3.0, 4.0])))", "5.0"),
        ("import sympy; x = sympy.symbols('x'); sympy.integrate(sympy.sin(x) ** 2, (x, 0, sympy.pi))", "pi/2"),
        ("import numpy.random; numpy.random.default_rng(1).integers(10, size=2).shape", "(2,)"),
        ("import numpy as np; float((np.ones((300, 300)) @ np.ones((300, 300))).sum())", "27000000.0"),
    ],
)
def test_preloaded_packages_compute(numeric_tool, code, text):
    result = run(numeric_tool, code)
    assert (result.text, result.ok) == (text, True)


def test_only_the_packages_asked_for_can_be_imported(numeric_tool, tool):
    for name in ("torch", "yaml", "pytest"):
        assert f"No module named '{name}'" in run(numeric_tool, f"import {name}").text
    assert "No module named 'numpy'" in run(tool, "import numpy").text
    listed = run(numeric_tool, "import os, numpy; sorted(os.listdir(os.path.dirname(os.path.dirname(numpy.__file__))))")
    assert set(eval(listed.text)) <= {"numpy", "numpy.libs", "sympy", "mpmath", "isympy.py"}


def test_preloaded_packages_change_no_limit(numeric_tool):
    failed = run(numeric_tool, "import numpy as np; np.ones(256 << 20, dtype=np.uint8).sum()")
    assert not failed.ok
    assert "Memory" in failed.text
    assert run(numeric_tool, "import numpy as np; int(np.ones(32 << 20, dtype=np.uint8).sum())").text == str(32 << 20)
    assert run(numeric_tool, "open('/usr/lib/x', 'w')").text.endswith("'/usr/lib/x'")
    written = run(numeric_tool, "import numpy, os; open(os.path.join(os.path.dirname(numpy.__file__), 'x'), 'w')")
    assert "Read-only file system" in written.text or "Permission denied" in written.text
    assert run(numeric_tool, "import os; dict(os.environ)").text == "{}"


def test_calls_with_preloaded_packages_share_nothing(numeric_tool):
    run(numeric_tool, "import numpy; numpy.pi = 3")
    assert run(numeric_tool, "import numpy; numpy.pi > 3.1").text == "True"


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ToolError, match="no-such-package"):
        PythonTool(PythonToolConfig(packages=["no-such-package"])).start()


@pytest.fixture(scope="module")
def stateful_tool():
    tool = started(timeout_s=3, state="path")
    yield tool
    tool.close()


def test_a_call_finds_what_the_earlier_calls_of_its_path_left(stateful_tool):
    first = "import math, random\ndef double(n):\n    return 2 * n\nprint('once')\nx = random.random()\nx"
    second = "open('note', 'w').write(str(x)); y = double(21)"
    printed = stateful_tool.run(first).text
    assert printed.startswith("once\n0.")
    assert stateful_tool.run("y, open('note').read()", (first, second)).text == f"(42, '{printed[5:]}')"
    assert "NameError" in stateful_tool.run("y", (first,)).text
    assert stateful_tool.run("x").text.endswith("NameError: name 'x' is not defined")


def test_earlier_calls_are_not_heard_again(stateful_tool):
    history = (
        "import os, sys, atexit, threading; os.write(1, b'raw'); print('out'); print('err', file=sys.stderr)",
        "atexit.register(print, 'end'); threading.Thread(target=print, args=('thread',)).start()",
        "x = 1; raise SystemExit",
        "sys.stdout.write('left in a buffer')",
    )
    assert stateful_tool.run("x", history).text == "1"


def test_a_traceback_names_lines_of_earlier_calls(stateful_tool):
    said = stateful_tool.run("fail(0)", ("def fail(n):\n    return 1 / n",)).text
    assert 'File "<python 1>", line 2, in fail\n    return 1 / n' in said


def test_earlier_calls_share_the_time_of_the_call(stateful_tool):
    result = stateful_tool.run("print('never')", ("while True: pass",))
    assert result.text == "TimeoutError: stopped after 3 s"


def test_abandoning_a_call_ends_it(tool):
    code = "import time; time.sleep(8); print('late')"
    with ThreadPoolExecutor(2) as threads:
        start = time.monotonic()
        pending = [threads.submit(tool.run, code) for _ in range(2)]
        time.sleep(0.5)
        tool.abandon("something else")
        tool.abandon(code)
        assert [p.result(timeout=5).text for p in pending] == ["the call was given up"] * 2
        assert time.monotonic() - start < 6
    assert tool.run("1 + 1").text == "2"
    assert not tool._calls


def test_a_killed_worker_is_replaced(tool):
    server = tool._server._process.pid
    for _ in range(3):
        for child in descendants(server):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        assert [tool.run(f"{i}").text for i in range(3)] == ["0", "1", "2"]
    assert tool._server._process.pid == server
    only_ready_ones_left(tool)


def test_workers_killed_below_their_supervisor_are_replaced_too(tool):
    server = tool._server._process.pid
    for supervisor in (int(c) for c in Path(f"/proc/{server}/task/{server}/children").read_text().split()):
        for child in descendants(supervisor):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    time.sleep(0.1)
    assert [tool.run(f"{i}").text for i in range(4)] == ["0", "1", "2", "3"]
    assert tool._server._process.pid == server
