"""Hostile code for the Python tool, and a program that runs all of it: `python sandbox_attacks.py FOLDER`.

The program plays the trainer: it holds a secret in its environment, its memory and a file of FOLDER, listens on
sockets, and prints one JSON object: what each attack answered, and what it did to the program.
"""

import json
import os
import resource
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

SECRET = "s3cret-of-the-trainer"
OUTSIDE = "outside"

# Before every attack: `refused(act)` says how `act` ended, `libc` and `call` reach the kernel past Python, PARENT and
# PORT are the program's.
PRELUDE = """
import ctypes, os, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *args):
    if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args]) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def refused(*acts):
    for act in acts:
        try:
            print("DONE", act())
            return
        except (OSError, ValueError, MemoryError) as error:
            last = error
    print("refused", type(last).__name__)
"""

TIME = r"TimeoutError: stopped after 2 s$"
MEMORY = r"MemoryError"
REFUSED = r"\A(refused \w+\n?)+\Z"

# Name -> code, what its answer must match.
ATTACKS = {
    "fork bomb": ("while True:\n    try: os.fork()\n    except OSError: pass", TIME),
    "fork bomb of new sessions": (
        """
        while True:
            try:
                if os.fork() == 0:
                    os.setsid()
                    [signal.signal(s, signal.SIG_IGN) for s in range(1, 32) if s not in (9, 19)]
            except OSError: pass
        """,
        TIME,
    ),
    "thread bomb": (
        """
        made = 0
        try:
            while True:
                threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); made += 1
        except RuntimeError:
            print(made < 20)
            os._exit(0)
        """,
        r"\ATrue\Z",
    ),
    "100 GB at once": ("bytearray(100 << 30)", MEMORY),
    "100 GB mapped without reserve": ("import mmap\nrefused(lambda: mmap.mmap(-1, 100 << 30, flags=0x4022))", REFUSED),
    "100 GB in shared mappings": (
        """
        import mmap
        kept = []
        def more():
            while True: kept.append(mmap.mmap(-1, 1 << 26)); kept[-1].write(bytes(1 << 26))
        refused(more)
        """,
        REFUSED,
    ),
    "as much as one process may, in each of many": (
        """
        for _ in range(9):
            if os.fork() == 0: break
        kept = []
        try:
            while True: kept.append(bytearray(1 << 20))
        except MemoryError: pass
        time.sleep(9)
        """,
        r"(MemoryError: stopped, its processes together held too much memory|stopped after 2 s)$",  # if it is slow
    ),
    "memory files": ("refused(lambda: os.memfd_create('x'))", REFUSED),
    "kernel memory of semaphores, queues and watches": (
        "for n, *a in ((64, 0, 32000, 0o600), (68, 0, 0o600), (29, 0, 4096, 0o600), (240, b'q', 66, 0o600, 0),"
        " (294, 0), (206, 9, 0)): refused(lambda: call(n, *a))",
        REFUSED,
    ),
    "disk": (
        """
        def fill():
            for i in range(99):
                with open(str(i), "wb") as file: file.write(bytes(8 << 20))
        refused(fill)
        """,
        REFUSED,
    ),
    "endless loop": ("while True: pass", TIME),
    "endless loop in C": ("sum(iter(int, 1))", TIME),
    "endless loop with every signal ignored": (
        "[signal.signal(s, signal.SIG_IGN) for s in range(1, 65) if s not in (9, 19, 32, 33)]\nwhile True: pass",
        TIME,
    ),
    "stopped for good": ("os.kill(os.getpid(), signal.SIGSTOP)", TIME),
    "1 GB of output": (
        "for _ in range(1024): os.write(1, b'x' * (1 << 20))",
        r"\Ax+\n\[cut: \d{9,10} bytes in all\]",
    ),
    "1 GB of errors": (
        "for _ in range(1024): os.write(2, b'x' * (1 << 20))\nos._exit(1)",
        r"\Ax+\n\[cut: \d{9,10} bytes in all\]",
    ),
    "endless output": ("while True: os.write(1, b'x' * 65536)", TIME),
    "sockets to addresses": (
        """
        for family, address in ((2, ("127.0.0.1", PORT)), (2, ("192.0.2.1", 80)), (2, ("8.8.8.8", 53)),
                                (10, ("::1", PORT)), (2, ("169.254.169.254", 80)), (1, "\\0arpo-attack"),
                                (1, f"{OUTSIDE}/socket"), (40, (2, 1)), (40, (1, 1))):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                def connect():
                    with socket.socket(family, kind) as s:
                        s.settimeout(0.5); s.connect(address); s.send(b"x"); return address
                refused(connect)
        """,
        REFUSED,
    ),
    "sockets of other families": (
        """
        for family in range(64):
            if family not in (1, 2, 10):
                for kind in (1, 2, 3, 5): refused(lambda: socket.socket(family, kind))
        refused(lambda: socket.socket(2, 3, 1), lambda: socket.socket(10, 3, 58))
        """,
        REFUSED,
    ),
    "names": ("refused(lambda: socket.getaddrinfo('example.org', 80))", REFUSED),
    "environment": (
        """
        environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
        print(dict(os.environ), bool(environ) and environ[0])
        refused(lambda: open(f"/proc/{PARENT}/environ").read(), lambda: open("/proc/1/environ").read())
        """,
        r"\A\{\} (None|False)\nrefused FileNotFoundError\Z",
    ),
    "memory of the parent": (
        """
        buffer = ctypes.create_string_buffer(64)
        io = struct.pack("PL", ctypes.addressof(buffer), 64)
        for pid in (PARENT, 1, os.getppid()):
            refused(lambda: call(310, pid, io, 1, io, 1, 0), lambda: call(101, 16, pid, 0, 0),
                    lambda: call(312, pid, os.getpid(), 1, 0, 0), lambda: open(f"/proc/{pid}/mem", "rb").read(1))
        """,
        REFUSED,
    ),
    "files of the machine": (
        """
        for path in (f"{OUTSIDE}/secret", "/etc/passwd", "/proc/1/root/etc/passwd", "/jail", "/store", "/old",
                     "/bin/sh", "/dev/mem", "/dev/kmsg", "/dev/vsock", "/sys", "/proc", "/../../etc/shadow",
                     "/dev/fd/3"):
            refused(lambda: os.stat(path), lambda: open(path).read())
        handle = struct.pack("Ii", 8, 1) + bytes(8)
        refused(lambda: call(304, -100, handle, 0))
        here = os.open("/", os.O_RDONLY)
        refused(lambda: os.chroot("/tmp"))
        os.fchdir(here)
        for _ in range(99): os.chdir("..")
        refused(lambda: os.stat("etc/passwd"))
        """,
        REFUSED,
    ),
    "descriptors of the parent": (
        "for fd in range(3, 9999): refused(lambda: os.fstat(fd)) if fd < 20 else fd",
        REFUSED,
    ),
    "writes outside": (
        """
        for path in ("/x", "/dev/x", "/usr/lib/x", f"{OUTSIDE}/x", os.__file__):
            refused(lambda: open(path, "w"), lambda: os.chmod(path, 0o777), lambda: os.unlink(path),
                    lambda: os.rename(path, "x"), lambda: os.link(path, "x"), lambda: os.truncate(path, 0))
        refused(lambda: os.mknod("m", 0o020666, os.makedev(1, 1)), lambda: os.chmod("/dev/null", 0),
                lambda: os.utime("/dev/null"))
        """,
        REFUSED,
    ),
    "signals to the parent": (
        """
        for number in (0, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
            refused(lambda: os.kill(PARENT, number), lambda: os.killpg(PARENT, number),
                    lambda: signal.pidfd_send_signal(os.pidfd_open(PARENT), number))
        """,
        REFUSED,
    ),
    "signals to all": ("os.kill(-1, signal.SIGKILL)\ntime.sleep(0.2)\nprint('still here')", r"still here|SIGKILL"),
    "limits and priorities of the parent": (
        "refused(lambda: resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1)), lambda: os.setpriority(0, PARENT, 19),"
        " lambda: os.sched_setaffinity(PARENT, {0}))\nrefused(lambda: os.setpriority(2, os.getuid(), -20))",
        REFUSED,
    ),
    "limits raised": (
        "for name in ('AS', 'CPU', 'NPROC', 'NOFILE', 'FSIZE'):"
        " refused(lambda: resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (1 << 40, 1 << 40)))",
        REFUSED,
    ),
    "namespaces, mounts and modules through ctypes": (
        """
        zero = bytes(128)
        for n, *a in ((272, 0x10000000), (272, 0x20000), (272, 0x40000000), (165, b"t", b"/tmp", b"tmpfs", 0, 0),
                      (155, b"/tmp", b"/tmp"), (308, 0, 0), (428, -100, b"/", 1), (430, b"tmpfs", 0),
                      (175, zero, 1, zero),
                      (321, 0, zero, 128), (298, zero, 0, -1, -1, 0), (323, 0), (425, 1, zero), (435, zero, 88),
                      (56, 0x10000011, 0, 0, 0, 0), (442, -100, b"/", 0, zero, 32), (166, b"/tmp", 2),
                      (169, 0, 0, 0, 0)):
            refused(lambda: call(n, *a))
        """,
        REFUSED,
    ),
    "keyrings": (
        "refused(lambda: call(248, b'user', b'k', b'v', 1, -4), lambda: call(250, 10, -4, b'user', b'k', 0))",
        REFUSED,
    ),
    "the 32-bit way into the kernel": (
        """
        import mmap
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex("b81400000031dbcd80c3"))  # getpid by int 0x80
        entry = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        pid = entry()
        print("DONE" if pid == os.getpid() else "refused OSError")
        """,
        r"stopped by SIG(SYS|SEGV)|refused OSError",
    ),
    "another identity": (
        """
        for act in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setresgid(0, 0, 0),
                    lambda: os.setgroups([0]), lambda: os.setreuid(PARENT_UID or 1, PARENT_UID or 1),
                    lambda: call(126, struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0xffffffff] * 6))):
            refused(act)
        """,
        REFUSED,
    ),
    "a program with the set-user-id bit": (
        """
        import shutil, glob
        program = [p for place in ("/lib64", "/lib", "/lib/*") for p in glob.glob(f"{place}/ld-linux*")][0]
        shutil.copy(program, "x"); os.chmod("x", 0o6755)
        if os.fork() == 0: os.execv("x", ["x", "--version"])
        os.wait()
        print("uid", set(os.getresuid()) == {os.getuid()} and os.getuid() > 0, call(157, 39, 0, 0, 0, 0))
        """,
        r"uid True None\Z",
    ),
    "what the call's own process was": (
        """
        import gc
        kinds = {type(o).__name__ for o in gc.get_objects()}
        print(sorted(kinds & {"Popen", "PythonTool", "ToolPool"}), [n for n in sys.modules if "arpo" in n])
        """,
        r"\A\[\] \[\]\Z",
    ),
    "a tracer of its own": ("refused(lambda: call(101, 0, 0, 0, 0))", REFUSED),
}


def main(folder: str) -> None:
    from arpo_ext.config import PythonToolConfig
    from arpo_ext.errors import ToolError
    from arpo_ext.tools.python_sandbox import PythonTool

    outside = Path(folder)
    (outside / "secret").write_text(SECRET)
    os.environ["SECRET"] = SECRET
    tool = PythonTool(PythonToolConfig(timeout_s=2, memory_mb=256, output_chars=4000, workers=1))
    try:
        tool.start()
    except ToolError as error:
        print(json.dumps({"refused": str(error)}))
        return
    limits = _limits()
    with _Listeners(outside) as (sockets, port):
        values = {"PARENT": os.getpid(), "PARENT_UID": os.getuid(), "PORT": port, "OUTSIDE": str(outside)}
        prelude = PRELUDE + "".join(f"{name} = {value!r}\n" for name, value in values.items())
        answers = {name: _run(tool, prelude + textwrap.dedent(code)) for name, (code, _) in ATTACKS.items()}
        visits = [s.getsockname() for s in sockets if _was_reached(s)]
    tool.close()
    print(
        json.dumps(
            {
                "uid": os.getuid(),
                "missing": tool.missing,
                "answers": answers,
                "visits": visits,
                "outside": sorted(path.name for path in outside.iterdir()),
                "secret": (outside / "secret").read_text(),
                "signals": sorted(signal.sigpending()),
                "limits_before": limits,
                "limits": _limits(),
                "capabilities": int(_status("CapEff"), 16),
            }
        )
    )


def _status(field: str) -> str:
    return next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if field in line)


def _limits() -> list:
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return [resource.getrlimit(getattr(resource, name)) for name in names] + [os.getpriority(os.PRIO_PROCESS, 0)]


def _run(tool, code: str) -> dict:
    start = time.monotonic()
    result = tool.run(code)
    seconds = time.monotonic() - start
    return {"text": result.text, "ok": result.ok, "seconds": seconds, "next": tool.run("6 * 7").text}


class _Listeners:
    """TCP and UDP on all addresses, an abstract and a named Unix socket."""

    def __init__(self, folder: Path) -> None:
        self._tcp = socket.create_server(("", 0))
        self._unix = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for end, address in zip(self._unix, ("\0arpo-attack", str(folder / "socket")), strict=True):
            end.bind(address)
            end.listen()

    def __enter__(self):
        return [self._tcp, *self._unix], self._tcp.getsockname()[1]

    def __exit__(self, *_):
        for end in (self._tcp, *self._unix):
            end.close()


def _was_reached(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        end.accept()
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
