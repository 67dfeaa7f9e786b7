"""The command line: what works without an engine, and one sentence with exit code 2 for every bad input."""

import importlib.metadata
import json

import pytest
from tiny import tiny_model, tiny_tokenizer

from arpo_ext.cli import _run_folder, main
from arpo_ext.config import load_config
from arpo_ext.errors import CheckpointError
from arpo_ext.ops import available_backends


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model_folder(tmp_path):
    """A folder that passes for a model until its weights are read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def test_info_names_every_backend_and_why_not(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out.partition("backends:\n")[2]
    for name, reason in available_backends().items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert line.endswith("usable" if reason is None else f"not usable: {reason}")


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["backends"] == available_backends()
    assert description["versions"]["torch"]


def test_the_installed_version_is_the_one_the_package_names(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"arpo-ext {importlib.metadata.version('arpo-ext')}\n"


def bad_inputs(tmp_path, model):
    prompts = write(tmp_path / "prompts.jsonl", {"question": "q", "answer": "1"})
    no_answer = write(tmp_path / "no_answer.jsonl", {"question": "q"})
    empty_corpus = tmp_path / "empty.jsonl"
    empty_corpus.write_text("")
    not_parquet = tmp_path / "x.parquet"
    not_parquet.write_text("no")
    missing = tmp_path / "missing.jsonl"
    train = ["train", f"model.path={model}", f"data.train={prompts}"]
    return {
        "unknown key": (["train", "rollout.pathz=1"], "unknown config key 'rollout.pathz'; the nearest known key is"),
        "N > M": (["train", "rollout.paths=2"], "expected N <= M"),
        "no config file": (["train", "--config", str(missing)], "cannot be read"),
        "no model": (["rollout", f"data.train={prompts}"], "model.path is not set; expected"),
        "missing model": (["rollout", f"data.train={prompts}", f"model.path={missing}"], "is not a folder; expected"),
        "empty model": (["rollout", f"data.train={prompts}", f"model.path={tmp_path}"], "holds no config.json"),
        "no data": (["train", f"model.path={model}"], "data.train is not set; expected"),
        "missing data": (["train", f"model.path={model}", f"data.train={missing}"], "does not exist"),
        "missing column": (["train", f"model.path={model}", f"data.train={no_answer}"], "answer"),
        "not parquet": (["train", f"model.path={model}", f"data.train={not_parquet}"], "not a parquet file"),
        "missing eval set": ([*train, f"data.eval={{held: {missing}}}"], "does not exist"),
        "no eval set": (["eval", f"model.path={model}"], "data.eval is empty; expected"),
        "missing demos": (["sft", f"model.path={model}", f"sft.data={missing}"], "does not exist"),
        "missing weights": (train, "holds no usable weights"),
        "no run": (["report", str(missing)], "missing.jsonl"),
    }


CASES = (
    *("unknown key", "N > M", "no config file", "no model", "missing model", "empty model", "no data", "missing data"),
    *("missing column", "not parquet", "missing eval set", "no eval set", "missing demos", "missing weights", "no run"),
)


def test_every_case_is_listed(tmp_path, model_folder):
    assert tuple(bad_inputs(tmp_path, model_folder)) == CASES


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_one_sentence_and_leaves_nothing_behind(case, tmp_path, model_folder, capsys):
    argv, part = bad_inputs(tmp_path, model_folder)[case]
    output = tmp_path / "out"
    if argv[0] != "report":
        argv = [*argv, f"output_dir={output}"]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"arpo-ext {argv[0]}: ")
    assert message.count("\n") == 1
    assert part in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("search", "part"),
    [
        ("{}", "tools.search.corpus"),
        ("{corpus: none.jsonl}", "none.jsonl"),
        ("{corpus: CORPUS}", "empty"),
    ],
    ids=["no corpus", "missing corpus", "empty corpus"],
)
def test_a_tool_that_cannot_start_ends_the_run_before_the_engine(
    search, part, tmp_path, model_folder, tag_tokenizer, capsys
):
    tag_tokenizer.save_pretrained(model_folder)
    corpus = write(tmp_path / "corpus.jsonl")
    prompts = write(tmp_path / "prompts.jsonl", {"question": "q", "answer": "1"})
    output = tmp_path / "out"
    argv = ["rollout", f"model.path={model_folder}", f"data.train={prompts}", f"output_dir={output}"]
    assert main([*argv, f"tools.search={search.replace('CORPUS', str(corpus))}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("arpo-ext rollout: ")
    assert message.count("\n") == 1
    assert part in message
    assert not output.exists()


def test_a_mistake_found_late_leaves_no_new_folder_and_can_be_mended(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    demos = write(
        tmp_path / "demos.jsonl", {"segments": [{"tokens": [6, 7], "train": False}, {"tokens": [8, 9], "train": True}]}
    )
    output = tmp_path / "out"
    argv = ["sft", f"model.path={tmp_path / 'model'}", f"sft.data={demos}", f"output_dir={output}", "sft.steps=1"]
    argv += ["tracking.progress=false", "sft.batch_size=1", "sft.warmup_steps=0"]
    assert main([*argv, "sft.max_tokens=3"]) == 2
    assert "3" in capsys.readouterr().err
    assert not output.exists()
    assert main(argv) == 0
    assert (output / "model" / "config.json").is_file()


def test_a_parquet_without_the_columns_is_refused(tmp_path, model_folder, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"question": ["q"]}), path)
    assert main(["train", f"model.path={model_folder}", f"data.train={path}", f"output_dir={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert "reward_model" in message
    assert "question" in message
    assert not (tmp_path / "out").exists()


def test_a_used_run_folder_is_refused_and_kept(tmp_path, model_folder, capsys):
    prompts = write(tmp_path / "prompts.jsonl", {"question": "q", "answer": "1"})
    metrics = write(tmp_path / "metrics.jsonl", {"step": 0})
    argv = ["train", f"model.path={model_folder}", f"data.train={prompts}", f"output_dir={tmp_path}"]
    assert main(argv) == 2
    assert "holds a run already; expected a new folder or train.resume=true" in capsys.readouterr().err
    assert metrics.read_text() == '{"step": 0}\n'


def test_several_processes_are_refused(tmp_path, model_folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    prompts = write(tmp_path / "prompts.jsonl", {"question": "q", "answer": "1"})
    assert main(["rollout", f"model.path={model_folder}", f"data.train={prompts}", f"output_dir={tmp_path / 'o'}"]) == 2
    assert "got 2 processes; expected one" in capsys.readouterr().err


def test_a_folder_with_trees_alone_is_a_used_one(tmp_path, model_folder, capsys):
    prompts = write(tmp_path / "prompts.jsonl", {"question": "q", "answer": "1"})
    write(tmp_path / "trees.jsonl", {"version": 1})
    assert main(["rollout", f"model.path={model_folder}", f"data.train={prompts}", f"output_dir={tmp_path}"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_refused_checkpoint_keeps_the_configuration_of_its_run(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    with pytest.raises(CheckpointError), _run_folder(load_config(None, [f"output_dir={tmp_path}"])):
        raise CheckpointError("another seed")
    assert (tmp_path / "config.yaml").read_text() == "seed: 7\n"


def test_an_unknown_command_exits_with_2():
    with pytest.raises(SystemExit) as exit_:
        main(["fly"])
    assert exit_.value.code == 2
