"""A scheduler for an engine in a process of its own whose batches do not depend on time."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs


class SteppedScheduler(Scheduler):
    """Runs one step each time it is resumed and answers every step.

    vLLM's own loop decodes on while the driver works, so which requests share a batch, and with it the rounding of
    their logits, would depend on how fast the driver is. Needs synchronous scheduling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pause_state = PauseState.PAUSED_ALL

    def has_requests(self) -> bool:
        """False while paused: clearing finished requests between steps would reorder the batch, unlike in-process."""
        return self._pause_state == PauseState.UNPAUSED and super().has_requests()

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(*args, **kwargs)
        self._pause_state = PauseState.PAUSED_ALL
        # A step that only computed a part of prompts outputs nothing, and the driver waits for it.
        return outputs or {0: EngineCoreOutputs()}
