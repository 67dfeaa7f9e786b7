"""Labels out of range where a kernel cannot raise, on a GPU: they count as ignored, and are counted for each device.

The counter must not be made while a CUDA graph is captured: its memory would be the graph's, and every replay would
start it from zero. So the public functions make it before they call an op, and torch.compile makes it while it traces.
A graph captured before any of these, from a direct call of an op of `torch.ops.arpo_ext`, counts nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[torch.device, Tensor] = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def invalid_label_counter(device: torch.device) -> Tensor | None:
    """int64 [] to add to; None if there is none yet and a graph is being captured."""
    if device not in _counters and not _capturing(device):
        # A sampler's first call is often in inference mode; a counter made there could not be added to outside it.
        with torch.inference_mode(False):
            counter = torch.zeros((), dtype=torch.int64, device=device)
        if type(counter) is not Tensor:  # a tracer's, without memory
            return counter
        if device.type == "cuda":
            # Once: a call on another stream must not count before the zero is there.
            torch.cuda.current_stream(device).synchronize()
        _counters[device] = counter
    return _counters.get(device)


def prepare_invalid_label_counter(device: torch.device) -> bool:
    """For public functions, before the op that counts."""
    return invalid_label_counter(device) is not None


# What torch.compiler.assume_constant_result sets, so that a trace runs the function and does not look inside. The
# decorator itself imports torch._dynamo and with it triton: seconds, for everybody who imports this package.
prepare_invalid_label_counter._dynamo_marked_constant = True


def invalid_labels(device: torch.device | str) -> int:
    """How many labels on this CUDA device were out of range so far (treated as ignored). Waits for the device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    counter = _counters.get(device)
    return 0 if counter is None else int(counter.item())
