"""Configuration: what is refused, with which sentence, and that a dump reads back."""

import pytest

from arpo_ext.config import Config, dump_config, load_config
from arpo_ext.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.pathz=3", "unknown config key 'rollout.pathz'; the nearest known key is 'rollout.paths'"),
        ("paths=3", "unknown config key 'paths'; the nearest known key is 'rollout.paths'"),
        ("tools.pythn={}", "unknown config key 'tools.pythn'; the nearest known key is 'tools.python'"),
        ("rollout.paths=2", "config section 'rollout': initial_paths (N) is 8 and paths (M) is 2; expected N <= M"),
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
