"""Errors a caller can act on. Each says in one sentence what was got and what is expected.

The command line turns every `ArpoError` into that sentence and exit code 2; anything else is a defect of this package
and keeps its traceback.
"""


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


class CheckpointError(ArpoError, RuntimeError):
    """A checkpoint is missing, incomplete or belongs to another run."""
