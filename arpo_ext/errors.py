"""Errors a caller can act on. Each says in one sentence what was got and what is expected.

The command line turns every `ArpoError` into that sentence and exit code 2; anything else is a defect of this package
and keeps its traceback.
"""

from typing import Any


class ArpoError(Exception):
    """Base of the errors this package raises on purpose."""


class ConfigError(ArpoError, ValueError):
    """A configuration key or value is unknown, out of range or contradicts another."""


class DataError(ArpoError, ValueError):
    """A file of prompts, demonstrations, documents or rollout trees is missing or not of the expected form."""


class ModelError(ArpoError, ValueError):
    """A model or tokenizer folder is missing, unreadable or lacks what the run needs."""


class ToolError(ArpoError, RuntimeError):
    """A tool cannot start. A call that fails later is a `ToolResult` with `ok=False`, never an exception."""


class TransientToolError(ToolError):
    """Raised by `Tool.run` for a fault that may pass (a network, a busy service): the pool tries again."""


class SamplerError(ArpoError, RuntimeError):
    """The generation engine is not in a state that allows the request, such as a weight push with open requests."""


class CollectError(SamplerError):
    """The generation engine failed while trees were collected.

    collected: what `rollout.collect` would have returned, the paths that were open cut as cancelled. Its complete trees
    (`RolloutTree.is_complete`) let a later call go on with the rest.
    """

    def __init__(self, message: str, collected: Any) -> None:
        super().__init__(message)
        self.collected = collected


class EngineError(SamplerError):
    """The generation engine's own process is gone, and with it what it was sampling. Everything else is kept."""


class CheckpointError(ArpoError, RuntimeError):
    """A checkpoint is missing, incomplete or belongs to another run."""
