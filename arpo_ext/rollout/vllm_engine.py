"""vLLM's engine, in this process or in one of its own: started, stepped, given weights and watched alike.

Left out: what is sampled (`vllm_sampler`), what happens inside the workers (`vllm_worker`, `vllm_entropy`).
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from arpo_ext.config import EngineConfig
from arpo_ext.errors import ConfigError, EngineError, SamplerError

# Read while vLLM is imported; what the user has set stays. An engine that somebody starts beside ours, as benchmarks
# do, runs in this process too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams, envs
from vllm.distributed.parallel_state import destroy_model_parallel
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.v1.engine import core
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.exceptions import EngineDeadError

from arpo_ext.rollout.vllm_entropy import COLUMNS, ENTROPY_PROCESSOR
from arpo_ext.rollout.vllm_watch import how_it_ended, wake_callers_at_its_death
from arpo_ext.rollout.vllm_worker import WORKER_EXTENSION, is_tied

# Prompts in chunks: vLLM 0.32 takes back what a chunk has drawn, which a seeded generator on a CPU cannot do
# (RuntimeError: CPU Generator does not use offset), and all of ours are seeded.
CPU_OPTIONS = {"enforce_eager": True, "enable_chunked_prefill": False}
STEPPED_SCHEDULER = "arpo_ext.rollout.vllm_stepped.SteppedScheduler"


class Engine:
    """One vLLM engine with the entropy processor in it.

    columns: of the entropy log. deterministic: batches follow from the order of the calls alone, in either process; it
    costs asynchronous scheduling and, in a process of its own, that the engine decodes while the caller computes.

    Every method raises EngineError once the engine's process is gone. Starting the engine in this process reseeds
    torch, numpy and random, as vLLM does.
    """

    def __init__(
        self, model_path: str | Path, config: EngineConfig, *, columns: int, seed: int, deterministic: bool
    ) -> None:
        self._llm = _start(model_path, config, columns, seed, deterministic)
        self._engine = self._llm.llm_engine
        self._core = self._engine.engine_core
        self.vllm_config = self._engine.vllm_config
        self.model_config = self._engine.model_config
        self._shares_memory = isinstance(self._core, InprocClient) and config.tensor_parallel_size == 1
        self._stepped = deterministic and config.own_process
        self._processes: Sequence[Any] = ()
        self._death = ""
        if config.own_process:
            self._processes = self._core.resources.engine_manager.processes
            wake_callers_at_its_death(self._core)

    def add(self, id: str, tokens: Sequence[int], params: SamplingParams) -> None:
        with self._alive():
            self._engine.add_request(id, {"prompt_token_ids": list(tokens)}, params)

    def abort(self, id: str) -> None:
        """Drop a request; a dead engine has dropped it already."""
        self._engine.abort_request([id])

    def step(self) -> list[RequestOutput]:
        """Outputs of the next step of the engine, which has open requests; waits for them."""
        with self._alive():
            if self._stepped:
                self._core.call_utility("resume_scheduler")
            return self._engine.step()

    def call_workers(self, method: str, *args: Any) -> Any:
        """What `method` of the worker extension returns on the first rank, after all ranks have run it."""
        with self._alive():
            try:
                return self._llm.collective_rpc(method, args=args)[0]
            except EngineDeadError:
                raise
            except Exception as error:
                if self._shares_memory:
                    raise
                # All that another process sends of its exception is a text.
                raise SamplerError(f"vLLM's workers failed in {method}: {error}") from None

    def reset_prefix_cache(self) -> None:
        """SamplerError if a block is in use."""
        with self._alive():
            done = self._engine.reset_prefix_cache()
        if not done:
            raise SamplerError("vLLM refused to reset its prefix cache; expected it to hold no blocks when idle")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights under their checkpoint names; what is cached of the old ones stays.

        Workers in other processes read them from one file that all ranks map, in memory where there is room.
        """
        tied = is_tied(self.model_config)
        # A tied lm_head is the embedding; loading it under its own name writes the same memory twice.
        checkpoint = ((name, tensor.detach()) for name, tensor in weights if not (tied and name == "lm_head.weight"))
        if self._shares_memory:
            # Clones, because the engine may keep what it is given while the trainer goes on.
            self.call_workers("arpo_load_weights", ((name, tensor.clone()) for name, tensor in checkpoint))
            return
        tensors = dict(checkpoint)
        with tempfile.TemporaryDirectory(prefix="arpo_weights_", dir=_folder_for(tensors)) as folder:
            path = os.path.join(folder, "weights.pt")
            torch.save(tensors, path)
            self.call_workers("arpo_load_weights_file", path)

    def close(self) -> None:
        """Stop the engine; it cannot be used afterwards."""
        with _process_group_kept() if _ranks() > 1 else nullcontext():
            # Its process is killed if it takes longer, and leaves shared memory behind.
            self._core.shutdown(timeout=30)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        if self._death:
            # Nobody would answer.
            raise EngineError(self._death)
        try:
            yield
        except EngineDeadError:
            lost = self._engine.get_num_unfinished_requests()
            self._death = (
                f"vLLM's engine process {how_it_ended(self._processes)} with {lost} requests open, which are lost; "
                "expected it to run: start a new sampler, or the command again (train.resume=true goes on from the "
                "last checkpoint)"
            )
            raise EngineError(self._death) from None


def _start(model_path: str | Path, config: EngineConfig, columns: int, seed: int, deterministic: bool) -> LLM:
    on_cpu = current_platform.is_cpu()
    options: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    max_num_batched_tokens = config.max_num_batched_tokens
    if on_cpu:
        # VLLM_CPU_KVCACHE_SPACE, where the user has set it, wins over this in vLLM itself.
        options = {"kv_cache_memory_bytes": config.kv_cache_gib << 30, **CPU_OPTIONS}
        if not options["enable_chunked_prefill"]:
            max_num_batched_tokens = max(max_num_batched_tokens or 4096, config.max_model_len)
    block_size = config.block_size or (32 if on_cpu else None)
    if block_size is not None:
        options["block_size"] = block_size
    if _ranks() > 1:
        options |= _options_of_a_rank(config)
    if deterministic:
        options["async_scheduling"] = False
        if config.own_process:
            options["scheduler_cls"] = STEPPED_SCHEDULER
    _let_vllm_scan_modules()
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    with _environment(config), warnings.catch_warnings():
        # From vLLM's scan of every loaded module, torch.distributed among them.
        warnings.filterwarnings("ignore", "`torch.distributed.reduce_op`", FutureWarning)
        llm = LLM(
            str(model_path),
            # "auto" would turn a float32 checkpoint into 16 bits.
            dtype=str(AutoConfig.from_pretrained(model_path).dtype or "auto").removeprefix("torch."),
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            tensor_parallel_size=config.tensor_parallel_size,
            seed=seed,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            logits_processors=[ENTROPY_PROCESSOR],
            worker_extension_cls=WORKER_EXTENSION,
            additional_config={COLUMNS: columns},
            use_tqdm_on_load=False,
            **options,
        )
    # vLLM's CPU worker replaces torch.set_num_threads, for the whole process, by a function that does nothing.
    torch.set_num_threads = set_num_threads
    torch.set_num_threads(threads)
    if config.threads is not None:
        llm.collective_rpc("arpo_set_threads", args=(config.threads,))
    return llm


def _ranks() -> int:
    """Processes that were joined before an engine was started in each of them; an engine's own group is of one."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def _options_of_a_rank(config: EngineConfig) -> dict[str, Any]:
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"engine.tensor_parallel_size is {config.tensor_parallel_size} with {_ranks()} processes; expected 1, for "
            "each process has an engine of its own"
        )
    # An engine in this process finds the group of all ranks and takes its place in it, and its device, from there.
    return {} if config.own_process else {"distributed_executor_backend": "external_launcher"}


@contextmanager
def _process_group_kept() -> Iterator[None]:
    """vLLM ends the default process group together with an engine in this process; here it is the trainer's."""
    ending, core.cleanup_dist_env_and_memory = core.cleanup_dist_env_and_memory, destroy_model_parallel
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = ending


@contextmanager
def _environment(config: EngineConfig) -> Iterator[None]:
    """What vLLM is only told by the environment: where the engine runs, how its processes start and are bound."""
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(config.own_process))}
    # A fork would copy a process whose tools and OpenMP have threads.
    defaults = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTHONWARNINGS": "ignore::FutureWarning"}
    if config.own_process and _ranks() > 1 and not current_platform.is_cpu():
        rank = int(os.environ["LOCAL_RANK"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        wanted["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    if config.threads is not None:
        # vLLM binds the threads of a CPU worker to cores it counts itself; more threads would share them.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    wanted |= {name: value for name, value in defaults.items() if name not in os.environ}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    # An engine started earlier in this process has made vLLM remember the environment of then.
    envs.disable_envs_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _folder_for(tensors: Mapping[str, torch.Tensor]) -> str:
    """In memory if the weights fit there, else where temporary files go; SamplerError if they fit in neither."""
    needed = sum(tensor.nbytes for tensor in tensors.values()) + (1 << 20)
    candidates = ["/dev/shm", tempfile.gettempdir()]
    for folder in candidates:
        if os.path.isdir(folder):
            status = os.statvfs(folder)
            if status.f_bavail * status.f_frsize > needed:
                return folder
    raise SamplerError(f"weights of {needed / 2**20:.0f} MiB fit in none of {candidates}; expected room to push them")


def _let_vllm_scan_modules() -> None:
    """Make vLLM's scan for Triton kernels pass over objects whose `__dict__` is no dict.

    A CPU engine looks at `vars(x).get("kernel")` of every global of every loaded module. llvmlite's library handle,
    which comes with numba and so with bm25s, answers `__dict__` with a function, and the engine does not start:
    AttributeError: '_lib_fn_wrapper' object has no attribute 'get' (vLLM 0.32).
    """
    from vllm.triton_utils import dispatcher

    def dict_of(value: object) -> Any:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = dict_of
