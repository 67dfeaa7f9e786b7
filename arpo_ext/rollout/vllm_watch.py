"""Notices when the process of vLLM's engine ends, and tells who waits for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError


def wake_callers_at_its_death(core: Any) -> None:
    """Let who waits for the engine's process get EngineDeadError when it ends.

    vLLM's own monitor of a killed process closes the sockets and leaves both `get_output` and pending calls waiting
    for ever (0.32). Holds no reference to the client, so that it can be collected.
    """
    resources, outputs, calls = core.resources, core.outputs_queue, core.utility_results
    sentinels = [process.sentinel for process in resources.engine_manager.processes]

    def wait() -> None:
        connection.wait(sentinels)
        # First, so that a call made from here on is refused before it waits.
        resources.engine_dead = True
        outputs.put_nowait(EngineDeadError())
        for future in list(calls.values()):
            if not future.done():
                future.set_exception(EngineDeadError())

    threading.Thread(target=wait, daemon=True, name="arpo-engine-death").start()


def how_it_ended(processes: Sequence[Any]) -> str:
    """The number of the one process and what became of it."""
    (process,) = processes
    # It may still be on its way out: it says that it fails before it ends.
    process.join(5)
    code = process.exitcode
    if code is None:
        return f"{process.pid} failed"
    if code < 0:
        return f"{process.pid} was killed by {signal.Signals(-code).name}"
    return f"{process.pid} ended with exit code {code}"
