"""Configuration: YAML files, dotted overrides, and one error that names the nearest known key.

`load_config("run.yaml", ["rollout.paths=8"])` reads, overrides and checks in that order. Every section is a frozen
pydantic model; a key that no section knows is an error, because a misspelt key that is silently ignored trains the
wrong thing.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from arpo_ext.algorithms import ALGORITHMS, Preset
from arpo_ext.errors import ConfigError

# A tool's name is the tag the model writes.
ToolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
AlgorithmName = Literal[tuple(ALGORITHMS)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(_Section):
    path: Path | None = Field(None, description="Hugging Face model folder (config, weights, tokenizer)")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str = Field("sdpa", description="attn_implementation of transformers")
    gradient_checkpointing: bool = False


class DataConfig(_Section):
    train: Path | None = Field(None, description="prompts to train on, .parquet or .jsonl")
    eval: dict[str, Path] = Field(default_factory=dict, description="name -> prompts to evaluate on")
    limit: PositiveInt | None = Field(None, description="read at most this many prompts of a file")
    system_prompt: str | None = Field(None, description="put before prompts that have no system message")


class PythonToolConfig(_Section):
    timeout_s: PositiveFloat = 5.0
    memory_mb: PositiveInt = 512
    output_chars: PositiveInt = 4000
    workers: PositiveInt = 2
    state: Literal["call", "path"] = Field(
        "call", description="path: code also finds what the earlier good calls of its path defined"
    )
    packages: list[str] = Field(
        default_factory=list, description="installed packages that code may import, such as numpy and sympy; preloaded"
    )
    sandbox: Literal["required", "best_effort"] = Field(
        "required", description="best_effort: run although the kernel lacks a mechanism, and say which"
    )


class SearchToolConfig(_Section):
    source: Literal["bm25", "http", "serper", "brave"] = Field(
        "bm25",
        description="local corpus, Search-R1's retrieval server, or a web service whose key is in the environment",
    )
    corpus: Path | None = Field(None, description=".jsonl or .parquet with text (title), or .json map query -> text")
    index: Path | None = Field(None, description="folder that keeps the bm25 index; it is then mapped, not loaded")
    url: str | None = Field(None, description="address of the http source, or of a web service's stand-in")
    top_k: PositiveInt = 3
    snippet_chars: PositiveInt = 1000
    workers: PositiveInt = 1
    timeout_s: PositiveFloat = 30.0


class SummarizerConfig(_Section):
    """A chat model behind an OpenAI-compatible endpoint."""

    url: str = Field(description="the endpoint's base, such as http://localhost:8000/v1")
    model: str
    key_variable: str = Field("OPENAI_API_KEY", description="variable of the environment that holds the key, if any")
    max_tokens: PositiveInt = 512
    timeout_s: PositiveFloat = 60.0


class BrowserToolConfig(_Section):
    page_chars: PositiveInt = Field(6000, description="most text of a page that the model, or the summarizer, gets")
    window_chars: PositiveInt = Field(1000, description="pieces in which a long page is chosen from")
    max_mb: PositiveFloat = Field(4.0, description="most bytes read of a page")
    allow_private: bool = Field(False, description="also fetch from addresses inside this network")
    summarizer: SummarizerConfig | None = None
    workers: PositiveInt = 8
    timeout_s: PositiveFloat = 40.0


class McpToolConfig(_Section):
    """A tool of an MCP server; either the program to start or the address to reach."""

    command: list[str] | None = Field(None, min_length=1, description="program and arguments; speaks MCP over stdio")
    url: str | None = Field(None, description="address of a streamable HTTP server")
    tool: str = Field(description="the tool's name on the server")
    argument: str | None = Field(None, description="the parameter that gets the call's text; None: the only one")
    workers: PositiveInt = 4
    timeout_s: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _one_server(self) -> McpToolConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError(f"got command {self.command} and url {self.url}; expected exactly one of them")
        return self


class CustomToolConfig(_Section):
    """A class of your own that follows `arpo_ext.tools.Tool`."""

    path: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:Class")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class, after its name")
    workers: PositiveInt = 1


class ToolsConfig(_Section):
    python: PythonToolConfig | None = None
    search: SearchToolConfig | None = None
    browser: BrowserToolConfig | None = None
    mcp: dict[ToolName, McpToolConfig] = Field(default_factory=dict, description="tag -> tool of an MCP server")
    custom: dict[ToolName, CustomToolConfig] = Field(default_factory=dict, description="tag -> class of your own")
    retries: int = Field(2, ge=0, description="further attempts after a fault that may pass, such as a broken network")
    retry_delay_s: float = Field(0.5, ge=0, description="before the first further attempt; doubles each time")
    cache: Path | None = Field(None, description="folder that keeps good answers between runs and processes")
    cache_mb: PositiveInt = 1024
    records: Path | None = Field(None, description=".jsonl that gets one row per call")
    replay: Path | None = Field(None, description=".jsonl of records; answers then come from it alone")
    replay_wait: bool = Field(False, description="replayed calls take as long as the recorded ones did")

    @property
    def sections(self) -> dict[str, _Section]:
        """Tag -> settings of the configured tools: the built-in ones in the order of the fields, `mcp`, `custom`."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        built_in = {name: section for name, section in own.items() if isinstance(section, _Section)}
        return {**built_in, **self.mcp, **self.custom}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sections)

    @model_validator(mode="after")
    def _each_name_once(self) -> ToolsConfig:
        reserved = {"python", "search", "browser"}
        for section, names in (("mcp", reserved), ("custom", reserved | set(self.mcp))):
            for name in getattr(self, section):
                if name in names:
                    raise ValueError(
                        f"tools.{section} names a tool {name!r}, which exists already; expected another name"
                    )
        return self


class EngineConfig(_Section):
    """The vLLM engine that samples."""

    max_model_len: PositiveInt = 4096
    max_num_seqs: PositiveInt = 128
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="of one step, longer prompts in chunks (never on the CPU: there at least max_model_len)"
    )
    block_size: PositiveInt | None = Field(None, description="KV block; None: 32 on the CPU, else vLLM's own choice")
    own_process: bool = Field(
        False, description="engine in a process of its own: what ends it is then an error here, not our end"
    )
    tensor_parallel_size: PositiveInt = Field(1, description="processes that share the model's weights")
    gpu_memory_utilization: float = Field(0.6, gt=0, le=1)
    kv_cache_gib: PositiveInt = Field(1, description="KV cache of a CPU engine")
    threads: PositiveInt | None = Field(
        None, description="torch threads of the engine; None: as in this process, in one of its own as vLLM chooses"
    )


class ReferenceConfig(_Section):
    """Faults of ARPO's published code that the policy `reference` repeats, each of which can be switched off."""

    stale_baseline: bool = Field(
        True, description="compare with the first window that any earlier call had at the path's place in the batch"
    )
    own_baseline: bool = Field(True, description="compare a fork with its own first window, not with its path's")
    window_before_call: bool = Field(
        True, description="measure the turn that wrote the call; false: the k tokens after the result"
    )
    top_logprobs_sum: bool = Field(
        True, description="sum -p log p of each token's ten likeliest, over ln V; false: rollout.normalizer"
    )


class RolloutConfig(_Section):
    """M, N, Z, k, alpha, beta and tau of the paper (section 3) under their plain names."""

    paths: PositiveInt = Field(16, description="M: leaves of every tree")
    initial_paths: PositiveInt = Field(8, description="N: paths started from the prompt; `aepo` finds its own number")
    branch_width: PositiveInt = Field(1, description="Z: siblings a positive decision asks for")
    probe_tokens: PositiveInt = Field(20, description="k: tokens measured after each tool result")
    policy: Literal["paper", "reference", "aepo", "at2po", "appo", "random", "chain"] = "paper"
    base: float = Field(0.5, description="alpha; for `random` and `reference` the branch probability")
    weight: float = Field(0.2, description="beta; for `at2po` the alpha that siblings of a turn cost it")
    threshold: float = Field(0.5, description="tau")
    normalizer: Literal["mean_over_log_vocab", "sum_over_vocab"] = "mean_over_log_vocab"
    baseline: Literal["root", "post_tool"] = "root"
    reference: ReferenceConfig = ReferenceConfig()
    penalty: float = Field(0.05, ge=0, description="`aepo`: what each consecutive branch of a path takes off its score")
    split_slope: float = Field(0.5, description="`aepo`: beta of the split between initial paths and branches")
    min_distance: PositiveInt = Field(1, description="`appo`: tokens between two forks of one turn, at least")
    rounds: PositiveInt = Field(2, description="`at2po`: L, rounds of expansion that share the M - N branches evenly")
    temperature: PositiveFloat = 1.0
    max_tool_calls: int = Field(4, ge=0, description="per path")
    max_response_tokens: PositiveInt = Field(1024, description="per path, tool results included")
    max_tree_tool_calls: int | None = Field(None, ge=0, description="per tree; a call shared by paths counts once")
    max_tree_tokens: PositiveInt | None = Field(
        None, description="per tree, tool results included; each path gets an even share of what is left as it starts"
    )
    max_open_requests: PositiveInt | None = Field(None, description="at the engine at a time; the rest waits in order")
    max_open_calls: PositiveInt | None = Field(None, description="at the tools at a time; the rest waits in order")
    path_timeout_s: PositiveFloat | None = Field(
        None, description="from a path's first request on; a path that is late is cut and not trained"
    )
    collect_timeout_s: PositiveFloat | None = Field(
        None, description="of one collect call; paths still open then are cut and not trained"
    )
    entropies: Literal["probe", "all"] = Field("all", description="which sampled tokens keep their entropy in the tree")
    logit_bias: dict[str, float] = Field(default_factory=dict, description="token text -> bias added before sampling")
    deterministic: bool = Field(
        True, description="order of tools and batches fixed: same seed, same trees; costs asynchronous scheduling"
    )

    @model_validator(mode="after")
    def _initial_within_paths(self) -> RolloutConfig:
        if self.initial_paths > self.paths:
            raise ValueError(
                f"initial_paths (N) is {self.initial_paths} and paths (M) is {self.paths}; expected N <= M"
            )
        if self.max_tree_tokens is not None and self.max_tree_tokens < self.paths:
            raise ValueError(
                f"max_tree_tokens is {self.max_tree_tokens} and paths (M) is {self.paths}; "
                "expected at least one token for each path"
            )
        if self.policy == "appo" and self.entropies != "all":
            raise ValueError(f"policy appo chooses among all tokens, got entropies {self.entropies!r}; expected 'all'")
        if self.policy == "reference" and self.baseline != "root":
            raise ValueError(f"policy reference has a baseline of its own, got {self.baseline!r}; expected 'root'")
        return self


class RewardConfig(_Section):
    accuracy: Literal["math_or_f1", "token_f1", "exact"] = "math_or_f1"
    rules: Literal["strict", "published"] = "strict"


class SftConfig(_Section):
    data: Path | None = Field(None, description="demonstrations, .jsonl")
    steps: PositiveInt = 300
    batch_size: PositiveInt = 32
    micro_batch_size: PositiveInt = 16
    lr: PositiveFloat = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(50, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1, description="share of the steps over which lr falls linearly to 0")
    grad_clip: PositiveFloat = 1.0
    sharding: Literal["none", "fsdp2"] = Field(
        "none", description="of weights, gradients and moments over the processes; none: each has a copy"
    )
    max_tokens: PositiveInt = 2048


class TrainConfig(_Section):
    steps: PositiveInt = 40
    prompts_per_step: PositiveInt = 16
    updates_per_step: PositiveInt = Field(1, description="optimiser steps per rollout, over disjoint parts of it")
    packing: Literal["tree", "rows"] = Field("tree", description="what rows share is read once, or in every row")
    micro_batch_tokens: PositiveInt = Field(
        8192, description="`tree`: distinct tokens read at once; a longer row is alone"
    )
    micro_batch_rows: PositiveInt = Field(16, description="`rows`: rows read at once")
    lr: PositiveFloat = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: PositiveFloat = 1.0
    sharding: Literal["none", "fsdp2"] = Field(
        "none", description="of weights, gradients and moments over the processes; none: each has a copy"
    )
    estimator: Literal["grpo", "dr_grpo", "rloo", "opo", "grpo_passk", "none"] = "grpo"
    whiten: bool = Field(False, description="then: advantages minus mean, over std, of all trained tokens of the step")
    credit: Literal["soft", "hard", "turn"] = Field(
        "soft",
        description="what rows that share a token get for it: each its own, their mean, AT2PO's value of the turn",
    )
    entropy_advantage: float = Field(
        0.0, ge=0, description="AEPO's a: advantages times 1 + a * z(entropy of the token)"
    )
    overlong_share: float = Field(
        0.0, ge=0, le=1, description="last part of rollout.max_response_tokens over which a path's reward falls by 1"
    )
    dynamic_sampling: int = Field(
        0, ge=0, description="times a step that prompts whose paths all have one reward are replaced by the next ones"
    )
    loss_scale: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = Field(
        "token_mean",
        description="mean over tokens; over rows of the mean, the sum, the sum / loss_length of their tokens",
    )
    loss_length: PositiveInt = 1024
    ratio: Literal["token", "turn", "sequence"] = Field("token", description="tokens that share one (geometric mean)")
    clip: Literal["ppo", "gppo", "cispo", "sapo"] = Field("ppo", description="as ops.policy_loss; with dual_clip: dual")
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    dual_clip: float | None = Field(None, gt=1)
    tau_positive: PositiveFloat = Field(1.0, description="of clip sapo")
    tau_negative: PositiveFloat = Field(1.05, description="of clip sapo")
    old_logprob: Literal["sampler", "trainer"] = "sampler"
    importance_cap: PositiveFloat = Field(2.0, description="cap of the weight trainer/sampler probability")
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_coef: float = Field(0.0, ge=0, description="above 0 a copy of the first model is kept as the reference")
    entropy_coef: float = Field(0.0, ge=0, description="of the entropy bonus")
    warmup_steps: int = Field(0, ge=0)
    decay_fraction: float = Field(0.0, ge=0, le=1, description="share of the steps over which lr falls linearly to 0")
    save_every: int = Field(0, ge=0, description="0: only at the end, and on SIGTERM")
    keep_checkpoints: PositiveInt = Field(2, description="the last so many stay, and the best one")
    best_metric: str = Field(
        "reward/mean", description="what the best checkpoint has most of, as metrics.jsonl names it"
    )
    eval_every: int = Field(0, ge=0, description="0: before the first and after the last step")
    resume: bool = False

    @model_validator(mode="after")
    def _dual_clip_has_a_use(self) -> TrainConfig:
        if self.dual_clip is not None and self.clip in ("cispo", "sapo"):
            raise ValueError(f"got dual_clip {self.dual_clip} with clip {self.clip!r}; expected clip ppo or gppo")
        return self


class EvalConfig(_Section):
    modes: tuple[Literal["sampled", "greedy"], ...] = ("sampled", "greedy")
    samples_per_prompt: PositiveInt = 1


class TrackingConfig(_Section):
    tensorboard: bool = True
    wandb: str | None = Field(None, description="project of Weights & Biases; its own variables name the account")
    trackio: str | None = Field(None, description="project of Trackio; its own variables name the Space, if any")
    progress: bool = True
    trees_per_step: int = Field(4, ge=0, description="trees of each step kept in trees.jsonl; all for `rollout`")


class Config(_Section):
    algorithm: AlgorithmName | None = Field(None, description="of arpo_ext/algorithms.py; stands for the keys it lists")
    seed: int = Field(0, ge=0)
    output_dir: Path = Path("runs/run")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tools: ToolsConfig = ToolsConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    sft: SftConfig = SftConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _keys_of_the_algorithm(cls, values: Any) -> Any:
        preset = _preset(values)
        return values if preset is None else _merged(preset, values)

    @model_validator(mode="after")
    def _entropies_where_read(self) -> Config:
        if self.train.entropy_advantage and self.rollout.entropies != "all":
            got = f"train.entropy_advantage {self.train.entropy_advantage} with rollout.entropies"
            raise ValueError(f"got {got} {self.rollout.entropies!r}; expected 'all'")
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: all defaults), apply `a.b=value` overrides, check. Raises ConfigError.

    An override's value is YAML: `rollout.paths=8`, `eval.modes=[greedy]`, `tools.python={}`. What is nearer the caller
    wins: the keys of an overridden `algorithm` replace those of the file, other overrides replace both.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read ({error.strerror}); expected a YAML file") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path} holds a {type(values).__name__}; expected a mapping of sections")
    chosen = [override for override in overrides if override.startswith("algorithm=")]
    for override in chosen:
        _apply_override(values, override)
        values = _merged(values, _preset(values) or {})
    for override in overrides:
        if override not in chosen:
            _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _preset(values: Any) -> Preset | None:
    """The keys of the algorithm that `values` names; None if it names none that is known."""
    name = values.get("algorithm") if isinstance(values, Mapping) else None
    return ALGORITHMS[name]() if isinstance(name, str) and name in ALGORITHMS else None


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, sections key by key; a value of `over` wins."""
    merged = {**under, **over}
    for name in under.keys() & over.keys():
        if isinstance(under[name], Mapping) and isinstance(over[name], Mapping):
            merged[name] = {**under[name], **over[name]}
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r} has a value that is not YAML") from None
    if isinstance(value, str):
        # YAML 1.1 reads 3e-4 as text; numbers without a dot are common on the command line.
        with contextlib.suppress(ValueError):
            value = float(value)
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        for inner in (info.annotation, *get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _known_keys(inner, f"{prefix}{name}.")


def _explain(error: ValidationError) -> str:
    """One sentence for the first fault pydantic found."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = list(_known_keys(Config))
        siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        nearest = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
        nearest = nearest or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        # The same last word in another section is nearer than a similar word in this one.
        elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        return f"unknown config key {key!r}; the nearest known key is {(elsewhere or nearest)[0]!r}"
    if fault["type"] == "value_error":
        return f"config section {key!r}: {fault['ctx']['error']}"
    got = fault["input"]
    if key == "algorithm":
        nearest = difflib.get_close_matches(str(got), ALGORITHMS, n=1, cutoff=0.0)
        return f"config key 'algorithm' is {got!r}; the nearest known algorithm is {nearest[0]!r}"
    return f"config key {key!r} is {got!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}"
