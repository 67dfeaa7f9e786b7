"""Runs code as a program: fresh `__main__`, the value of a last bare expression printed, short tracebacks."""

import ast
import atexit
import builtins
import contextlib
import linecache
import os
import random
import sys
import threading
import traceback
import types
from collections.abc import Sequence

NAME = "<python>"
# The innermost frames say what went wrong; a deep recursion must not fill the model's context.
_FRAMES = 6

# Imported once by the server, so that a call which uses them does not pay for it.
PRELOADED = """
    bisect calendar cmath collections copy csv dataclasses datetime decimal enum fractions functools hashlib heapq io
    itertools json math numbers operator random re statistics string textwrap time typing
""".split()  # noqa: SIM905 - a list of words reads better


def run(code: str, history: Sequence[str] | None = None) -> int:
    """Execute `code` in this process, which must end afterwards with the returned exit status.

    history: what is executed before it, in the same `__main__` and unheard; if it is not None, `random` is seeded, so
    that what it gave when `code` was the last of a history, it gives again.
    """
    _open_streams()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = [NAME]
    # Normally put there by the site module.
    builtins.exit = builtins.quit = sys.exit
    if history is not None:
        random.seed(0)
    for turn, earlier in enumerate(history or ()):
        _run_again(earlier, f"<python {turn + 1}>", main.__dict__)
    status = _guarded(lambda: _execute(code, NAME, main.__dict__))
    # What an interpreter does at its end: wait for threads, then the exit functions, then flush.
    status = _guarded(threading._shutdown) or status
    status = _guarded(atexit._run_exitfuncs) or status
    return _guarded(_flush) or status


def _run_again(code: str, name: str, scope: dict[str, object]) -> None:
    """Execute `code` to its very end, as a call of its own does, with its output going nowhere."""
    kept = os.dup(1), os.dup(2)
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    _guarded(lambda: _execute(code, name, scope))
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    _guarded(atexit._run_exitfuncs)
    _guarded(_flush)
    for fd, own in enumerate(kept, start=1):
        os.dup2(own, fd)
        os.close(own)
    os.close(null)


def _open_streams() -> None:
    # Line by line, so that what was printed before a timeout is seen.
    settings = {"buffering": 1, "encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the end
    sys.stdout = sys.__stdout__ = open(1, "w", **settings)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", **settings)  # noqa: SIM115


def _execute(code: str, name: str, scope: dict[str, object]) -> None:
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), scope)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), scope)
        if value is not None:
            print(value)


def _guarded(act: types.FunctionType) -> int:
    """The exit status `act` leads to; what it raises is printed the way an interpreter would, only shorter."""
    try:
        act()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - code of the model may raise anything
        report = traceback.TracebackException.from_exception(error)
        own = [frame for frame in report.stack if frame.filename.startswith(NAME[:-1])]
        report.stack = traceback.StackSummary.from_list(own[-_FRAMES:])
        with contextlib.suppress(OSError, ValueError):
            os.write(2, "".join(report.format(chain=False)).encode("utf-8", "backslashreplace"))
        return 1
    return 0


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
