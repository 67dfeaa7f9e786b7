"""Entropies of sampled tokens, kept on the device where the logits are.

One preallocated float32 buffer, a row per request, a column per output position. Writing overwrites: the engine runs
prompts in chunks, and each chunk produces logits at output position 0 that are thrown away but for the last. Nothing
is read back until a request is due, so no token waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arpo_ext import ops


class EntropyLog:
    """Buffer [rows + 1, columns]: output token j of request i is cell i * columns + j.

    rows: requests that can be open at once. columns: output positions recorded at most. discard: a cell of the extra
    row, for what nobody asked for.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows = rows
        self.columns = columns
        self._buffer = torch.full((rows + 1, columns), float("nan"), dtype=torch.float32, device=device)
        self._flat = self._buffer.view(-1)
        self.discard = rows * columns
        # By batch size and stride, all that differs between steps of an engine: the op and where it writes. A token
        # checks little anew and allocates nothing.
        self._writers: dict[tuple[int, int], tuple[ops.EntropyWriter, torch.Tensor]] = {}

    def record(
        self,
        logits: torch.Tensor,
        cells: torch.Tensor | list[int],
        temperature: float | torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Store the entropies of softmax(logits / temperature).

        logits: [B, V], -inf where a token is not allowed. cells: [B] int64 on the same device, or on a CPU a list of as
        many. temperature: a number or [B] float32 on the same device. mask: [B] bool, rows that are not read (their
        cell: `discard`).
        """
        layout = (logits.shape[0], logits.stride(0))
        if layout not in self._writers:
            entropy = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
            self._writers[layout] = ops.EntropyWriter(logits, entropy), entropy
        write, entropy = self._writers[layout]
        if mask is None and isinstance(temperature, float):
            write(logits, temperature)
        else:
            ops.logprob_entropy_into(logits, entropy=entropy, temperature=temperature, mask=mask)
        if isinstance(cells, list):
            # Beside a decoding step code is cold: numpy takes a list in a third of the time of two torch calls.
            self._flat.numpy()[cells] = entropy.numpy()
        else:
            self._flat.scatter_(0, cells, entropy)

    def clear(self, row: int) -> None:
        """Forget what is in a row: NaN."""
        self._buffer[row].fill_(float("nan"))

    def read(self, rows: Sequence[int], counts: Sequence[int]) -> list[list[float]]:
        """The first counts[i] entropies of each rows[i]: one copy to the host for all of them."""
        if not rows:
            return []
        width = max(counts)
        values = self._buffer[torch.tensor(rows, device=self._buffer.device), :width].tolist()
        return [row[:count] for row, count in zip(values, counts, strict=True)]
