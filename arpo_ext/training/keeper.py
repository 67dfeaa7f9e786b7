"""Where a run stands: what it resumes from, what it saves, and what stays of that."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import set_seed

from arpo_ext.config import Config
from arpo_ext.errors import CheckpointError, ConfigError, DataError
from arpo_ext.training import checkpoint, checkpoint_folder
from arpo_ext.training.checkpoint import RunState
from arpo_ext.types import Prompt

_log = logging.getLogger(__name__)


class Keeper:
    """The checkpoints of one run.

    state: where the run stands, at first that of the checkpoint it resumes from. resumed: whether there is one.
    """

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], parts: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> None:
        """Put the latest checkpoint back into `parts` (accelerator, model, optimizer, tokenizer), if there is one.

        identity: what a resumed run must match besides seed and prompts.

        CheckpointError if there is one that must not be resumed, ConfigError if the folder cannot take another.
        """
        self.config, self._parts = config, parts
        self._settings = config.model_dump(mode="json")
        self._identity = {"seed": config.seed, "prompts": _digest(prompts), **identity}
        self._source = checkpoint_folder.latest(config.output_dir)
        if self._source and not config.train.resume:
            raise CheckpointError(
                f"{config.output_dir} holds {self._source.name} of a run; "
                "expected train.resume=true or another output_dir"
            )
        if parts["accelerator"].is_main_process:
            # Of the weights and the two moments that AdamW keeps of each.
            size = 3 * sum(parameter.numel() * parameter.itemsize for parameter in parts["model"].parameters())
            checkpoint_folder.check_room(config.output_dir, size, config.train.keep_checkpoints)
        # A run begins with an evaluation.
        self.state = RunState(evaluated=False)
        if self._source:
            own = {name: parts[name] for name in ("accelerator", "model", "optimizer")}
            self.state = checkpoint.load(self._source, self._identity, config=self._settings, **own)
        self._saved = self.state
        self._metrics = checkpoint_folder.read_state(self._source)["metrics"] if self._source else {}

    @property
    def resumed(self) -> bool:
        return self._source is not None

    def restore_generators(self) -> None:
        """Put the random generators where the run stands; the last thing before it goes on."""
        if self._source:
            if checkpoint.load_rng(self._source, self._parts["accelerator"]):
                return
            _log.warning(
                "%s is of another number of processes: random generators start anew from the seed", self._source.name
            )
        # Never those that the steps before the checkpoint began with.
        set_seed(self.config.seed + self.state.step, device_specific=True)

    def stands_at(self, state: RunState, metrics: Mapping[str, float]) -> None:
        """Note a state that can be resumed from, and metrics of its step. ConfigError if none is the best_metric."""
        self._metrics = {**(self._metrics if state.step == self.state.step else {}), **metrics}
        self.state, self._rng = state, checkpoint.rng_state()
        name = self.config.train.best_metric
        if name not in self._metrics and state.evaluated and name.startswith("eval/") == (state.step == 0):
            nearest = difflib.get_close_matches(name, self._metrics, n=1, cutoff=0.0)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise ConfigError(f"train.best_metric is {name!r}, which this run does not measure{hint}")

    def save(self) -> None:
        """Save where the run stands, once, and remove what need not stay. Call it on every rank."""
        if self.state == self._saved:
            return
        checkpoint.save(
            self.config.output_dir,
            self.state,
            self._identity,
            config=self._settings,
            metrics=self._metrics,
            rng=self._rng,
            **self._parts,
        )
        self._saved = self.state
        if self._parts["accelerator"].is_main_process:
            settings = self.config.train
            checkpoint_folder.prune(self.config.output_dir, settings.keep_checkpoints, settings.best_metric)


def _digest(prompts: Sequence[Prompt]) -> str:
    """Identity of the training data: the position of a checkpoint means nothing over other prompts."""
    if not prompts:
        raise DataError("got no prompts to train on; expected at least one")
    return hashlib.sha256("\n".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]
