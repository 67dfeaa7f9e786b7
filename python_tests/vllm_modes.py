"""vLLM in modes that a CPU does not offer by itself; for the tests that check them there, by hand or as a script.

    python -m vllm_modes FOLDER OUTPUT

samples from the model in FOLDER on the V2 model runner and writes what was sampled as JSON.
"""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

# As a sitecustomize module it reaches the engine's processes too. The V2 runner's kernels are Triton's, and vLLM asks
# for a build of Triton with a CPU backend; the interpreter runs them as well.
TRITON_ON_A_CPU = """
import triton.backends

class _Driver:
    is_active = staticmethod(lambda: True)

triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=_Driver)
"""


def v2_environment(folder: Path) -> dict[str, str]:
    """The environment of a Python whose vLLM runs the V2 model runner on the CPU."""
    (folder / "sitecustomize.py").write_text(TRITON_ON_A_CPU)
    paths = [str(folder), *(path for path in sys.path if path)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def asynchronous_and_chunked():
    """Engines started inside schedule asynchronously and take prompts in chunks.

    vLLM turns the first off on a CPU, where nothing is gained, and we the second; the order of what happens is the same
    as on a GPU.
    """
    import pytest
    from vllm.platforms.cpu import CpuPlatform

    from arpo_ext.rollout import vllm_engine

    check = CpuPlatform.check_and_update_config.__func__

    def check_but_for_scheduling(cls, config):
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_but_for_scheduling))
        patch.setitem(vllm_engine.CPU_OPTIONS, "enable_chunked_prefill", True)
        yield


def generate_into_a_file(folder, path, *, blocks=10):
    """Prompts through a bare vLLM that writes entropies to `path`; its few cache blocks make it preempt requests.

    Returns (request id, prompt, tokens, temperature) of each.
    """
    from vllm import LLM, SamplingParams

    from arpo_ext.config import EngineConfig
    from arpo_ext.rollout import vllm_engine
    from arpo_ext.rollout.vllm_entropy import ENTROPY_PROCESSOR

    vllm_engine._let_vllm_scan_modules()
    with vllm_engine._environment(EngineConfig()):
        llm = LLM(
            str(folder),
            dtype="float32",
            max_model_len=128,
            max_num_seqs=6,
            max_num_batched_tokens=32,
            block_size=32,
            num_gpu_blocks_override=blocks,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=1 << 28,
            logits_processors=[ENTROPY_PROCESSOR],
            additional_config={"entropy_jsonl": str(path)},
            use_tqdm_on_load=False,
            disable_log_stats=False,
        )
    prompts = [[14 + (7 * i + 3 * j) % 80 for j in range(20 + 5 * i)] for i in range(8)]
    # The last prompt is answered twice, by requests that share their parameters.
    params = [
        SamplingParams(temperature=0.7 if i % 2 else 0.0, max_tokens=60, ignore_eos=True, n=1 + i // 7)
        for i in range(8)
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    # In this process nobody steps on to clear the last request.
    llm.llm_engine.step()
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    llm.llm_engine.engine_core.shutdown()
    rows = []
    for output, prompt, param in zip(outputs, prompts, params, strict=True):
        for sample in output.outputs:
            id = output.request_id if param.n == 1 else f"{sample.index}_{output.request_id}"
            rows.append((id, prompt, list(sample.token_ids), param.temperature or 1.0))
    return rows, preemptions


def main(folder: str, output: str) -> None:
    from sampling import BIAS, TEMPERATURE, run, sample_request
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from arpo_ext.config import EngineConfig, RolloutConfig
    from arpo_ext.render import Renderer
    from arpo_ext.rollout.vllm_sampler import VllmSampler

    engine = EngineConfig(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=32, threads=1, own_process=True)
    rollout = RolloutConfig(
        temperature=TEMPERATURE, logit_bias=BIAS, probe_tokens=4, max_response_tokens=60, deterministic=False
    )
    # AutoTokenizer takes any folder of a Qwen2 for a byte-level BPE.
    renderer = Renderer(PreTrainedTokenizerFast.from_pretrained(folder), ["search", "fact"])
    with asynchronous_and_chunked():
        sampler = VllmSampler(folder, engine, rollout, renderer, seed=0)
    prompts = [[14 + (5 * i + 3 * j) % 80 for j in range(8 + 8 * i)] for i in range(12)]
    probes, done = run(sampler, [sample_request(i, prompt, max_tokens=10) for i, prompt in enumerate(prompts)])
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    sampler.push_weights((name, 0.5 * tensor) for name, tensor in trained.items())
    _, after_push = run(sampler, [sample_request(i, prompt, max_tokens=3) for i, prompt in enumerate(prompts[:4])])
    config = sampler._engine.vllm_config
    sampler.close()
    rows, preemptions = generate_into_a_file(folder, f"{output}.jsonl")
    found = {
        "v2": config.use_v2_model_runner,
        "asynchronous": config.scheduler_config.async_scheduling,
        "prompts": prompts,
        "probes": {id: asdict(probe) for id, probe in probes.items()},
        "done": {id: asdict(completion) for id, completion in done.items()},
        "after_push": {id: asdict(completion) for id, completion in after_push.items()},
        "rows": rows,
        "preemptions": preemptions,
    }
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
