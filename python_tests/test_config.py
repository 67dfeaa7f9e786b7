"""Configuration: what is refused, with which sentence, and that a dump reads back."""

import re
from pathlib import Path

import pytest

from arpo_ext.algorithms import ALGORITHMS
from arpo_ext.config import Config, dump_config, load_config
from arpo_ext.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.pathz=3", "unknown config key 'rollout.pathz'; the nearest known key is 'rollout.paths'"),
        ("paths=3", "unknown config key 'paths'; the nearest known key is 'rollout.paths'"),
        ("tools.pythn={}", "unknown config key 'tools.pythn'; the nearest known key is 'tools.python'"),
        ("rollout.paths=2", "config section 'rollout': initial_paths (N) is 8 and paths (M) is 2; expected N <= M"),
        ("algorithm=dappo", "config key 'algorithm' is 'dappo'; the nearest known algorithm is 'dapo'"),
        (
            "train={clip: sapo, dual_clip: 3}",
            "config section 'train': got dual_clip 3.0 with clip 'sapo'; expected clip ppo or gppo",
        ),
        ("sft.lr=-1", "config key 'sft.lr' is -1; input should be greater than 0"),
        ("sft.lr", "override 'sft.lr' is not of the form section.key=value"),
        ("eval.modes=[gredy]", "config key 'eval.modes.0' is 'gredy'; input should be 'sampled' or 'greedy'"),
    ],
)
def test_a_bad_override_is_one_sentence(override, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert str(error.value) == sentence


def test_overrides_win_over_the_file_and_numbers_need_no_dot(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\nrollout: {paths: 8, initial_paths: 4}\n")
    config = load_config(path, ["rollout.paths=6", "train.lr=3e-4", "tools.python={}"])
    assert (config.seed, config.rollout.paths, config.rollout.initial_paths) == (3, 6, 4)
    assert config.train.lr == 3e-4
    assert config.tools.names == ("python",)


def test_a_dump_reads_back(tmp_path):
    config = load_config(None, ["tools.search={corpus: docs.jsonl}", "data.eval={held: held.jsonl}"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_an_algorithm_stands_for_its_keys_and_each_can_be_overridden(tmp_path):
    config = Config.model_validate({"algorithm": "dapo"})
    assert (config.rollout.policy, config.train.clip_high, config.train.loss_scale) == ("chain", 0.28, "token_mean")
    path = tmp_path / "run.yaml"
    path.write_text("algorithm: dapo\ntrain: {clip_high: 0.3, lr: 1.0e-5}\nrollout: {policy: random, paths: 12}\n")
    config = load_config(path)
    assert (config.rollout.policy, config.rollout.paths) == ("random", 12)
    assert (config.train.clip_high, config.train.dynamic_sampling, config.train.lr) == (0.3, 3, 1e-5)
    # An algorithm given with the command replaces what the file says of it, and nothing else.
    config = load_config(path, ["train.clip_low=0.1", "algorithm=gspo"])
    assert (config.rollout.policy, config.rollout.paths, config.train.lr) == ("chain", 12, 1e-5)
    assert (config.train.ratio, config.train.clip_low, config.train.clip_high) == ("sequence", 0.1, 4e-4)
    assert config.train.dynamic_sampling == 0
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_the_readme_lists_every_algorithm():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `algorithm: (\w+)` \|", text, re.MULTILINE) == list(ALGORITHMS)


def test_all_algorithms_name_the_same_keys_and_are_valid():
    keys = {name: {s: set(own) for s, own in preset().items()} for name, preset in ALGORITHMS.items()}
    assert all(own == keys["grpo"] for own in keys.values())
    for name, preset in ALGORITHMS.items():
        config = Config.model_validate({"algorithm": name})
        for section, own in preset().items():
            assert {key: getattr(getattr(config, section), key) for key in own} == dict(own)


@pytest.mark.parametrize(("text", "part"), [("a: [", "is not YAML"), ("- 1", "holds a list; expected a mapping")])
def test_a_file_of_another_form_is_refused(tmp_path, text, part):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert load_config(path) == Config()
