"""Tiny models to sample from, requests, and what a sampler must have measured; for the tests of samplers."""

from concurrent.futures import Future

import torch

from arpo_ext.rollout import Probe, SampleRequest
from arpo_ext.types import ToolResult

TEMPERATURE = 0.7
BIAS = {"mass": 1.0, "q": -1.5}
# `fact` is no single token, so its closing tag is a stop string.
TALK = "<search>mass</search>", "<fact>q of</fact>", "<answer>7</answer><eos>"


def random_model(vocabulary, seed):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).float().eval()


def talking_model(renderer):
    """A model that has learnt to call both tools and to answer, not too surely."""
    tokenizer = renderer.tokenizer
    model = random_model(len(tokenizer), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.3)
    texts = [f"{start}{talk}" for start in ("mass of", "q</result>") for talk in TALK]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    labels = torch.where(ids > 0, ids, -100)
    for _ in range(100):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def sample_request(id, tokens=(20, 30, 40), max_tokens=12, seed=None, greedy=False):
    return SampleRequest(id, tuple(tokens), max_tokens, 4, seed=id if seed is None else seed, greedy=greedy)


def run(sampler, requests):
    for request in requests:
        sampler.submit(request)
    probes, done = {}, {}
    while sampler.num_unfinished:
        for event in sampler.step():
            if isinstance(event, Probe):
                assert event.id not in done
                probes[event.id] = event
            else:
                done[event.id] = event
    return probes, done


@torch.no_grad()
def measure(model, tokenizer, prompt, tokens, temperature, bias=BIAS):
    """Log-probabilities and entropies of `tokens` after `prompt`, straight from the definition."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
    for text, value in bias.items():
        logits[:, tokenizer.convert_tokens_to_ids(text)] += value
    logprobs = torch.log_softmax(logits / temperature, -1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), entropies.tolist()


class AnsweringTools:
    def submit(self, call):
        future = Future()
        future.set_result(ToolResult(call.name, "q", True))
        return future
