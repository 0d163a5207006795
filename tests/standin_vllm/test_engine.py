"""The stand-in engine against transformers, one unpadded sequence at a time."""

import inspect
import os

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from tests.rl.frozen import build_world
from tests.standin_vllm import LLM, Client, SamplingParams, standin_vllm


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 5, 6]]
REQUESTS = [{"prompt_token_ids": ids} for ids in PROMPTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def engine(world, **kwargs):
    return LLM(world, logprobs_mode="processed_logprobs", **kwargs)


@torch.no_grad()
def next_logits(model, ids):
    return model(torch.tensor([ids])).logits[:, -1]


def warped(logits, params):
    """Transformers' own warpers, in vLLM's order."""
    warpers = [
        TemperatureLogitsWarper(params.temperature),
        MinPLogitsWarper(params.min_p),
        TopKLogitsWarper(params.top_k or logits.shape[-1]),
        TopPLogitsWarper(params.top_p),
    ]
    for warper in warpers:
        logits = warper(None, logits)
    return logits.log_softmax(-1)[0]


@pytest.mark.parametrize(
    "processing",
    [{}, {"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.6, "temperature": 1.7}, {"min_p": 0.4},
     {"temperature": 0.2, "min_p": 0.05, "top_k": 6, "top_p": 0.8}],
)  # fmt: skip
def test_log_probabilities_are_those_of_the_processed_logits(world, processing):
    params = SamplingParams(n=4, max_tokens=8, logprobs=2, **processing)
    llm = engine(world)
    for prompt, request in zip(PROMPTS, llm.generate(REQUESTS, params, use_tqdm=False)):
        assert request.prompt_token_ids == prompt and len(request.outputs) == 4
        for output in request.outputs:
            for place, (token, table) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
                expected = warped(next_logits(llm.model.hf, prompt + output.token_ids[:place]), params)
                likeliest = expected.topk(2).indices.tolist()
                assert set(table) == {token, *likeliest} and expected[token] > -torch.inf
                for other, found in table.items():
                    assert found.logprob == pytest.approx(expected[other].item(), abs=1e-4)
                assert table[likeliest[0]].rank == 1


def test_greedy_is_what_transformers_generates(world):
    llm = engine(world)
    model = AutoModelForCausalLM.from_pretrained(world)
    for prompt, request in zip(PROMPTS, llm.generate(REQUESTS, SamplingParams(temperature=0.0, max_tokens=12))):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert request.outputs[0].token_ids == expected.tolist()
        assert request.outputs[0].logprobs is None


def test_samples_follow_their_probabilities(world):
    llm = engine(world, seed=3)
    n = 4000
    outputs = llm.generate(REQUESTS[:1], SamplingParams(n=n, max_tokens=1))[0].outputs
    counts = torch.tensor([o.token_ids[0] for o in outputs]).bincount(minlength=llm.model.hf.config.vocab_size)
    expected = next_logits(llm.model.hf, PROMPTS[0]).softmax(-1)[0]
    error = (counts / n - expected) / (expected * (1 - expected) / n).sqrt()
    assert error.abs().max() < 5


def test_completions_end_at_eos_or_at_a_limit(world):
    llm = engine(world, max_model_len=12)
    outputs = [r.outputs for r in llm.generate(REQUESTS, SamplingParams(n=40, max_tokens=9))]
    eos = llm.model.hf.config.eos_token_id
    for prompt, group in zip(PROMPTS, outputs):
        limit = min(9, 12 - len(prompt))
        assert {o.finish_reason for o in group} == {"stop", "length"}
        for output in group:
            assert eos not in output.token_ids[:-1]
            assert (output.token_ids[-1] == eos) == (output.finish_reason == "stop")
            assert output.finish_reason == "stop" or len(output.token_ids) == limit
    with pytest.raises(ValueError, match="A prompt of 12 tokens"):
        llm.generate([{"prompt_token_ids": [5] * 12}])


def test_the_engine_has_a_random_state_of_its_own(world):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    draws = [engine(world, seed=seed).generate(REQUESTS, SamplingParams(max_tokens=9)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert draws[0] == draws[1] != draws[2]


def test_only_whole_weights_under_their_own_names_are_taken(world):
    llm = engine(world)
    names = list(llm.weights())
    weight = torch.ones_like(llm.weights()["model.norm.weight"])
    load = llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights
    with pytest.raises(KeyError, match="base_model.model"):
        load([("base_model.model.model.norm.weight", weight)])
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        load([("model.norm.weight", weight[:0])])
    with pytest.raises(TypeError, match="no whole weight"):
        load([("model.norm.weight", weight.to("meta"))])
    assert load([("model.norm.weight", 3 * weight)]) == {"model.norm.weight"}
    assert torch.equal(llm.weights()["model.norm.weight"], 3 * weight) and list(llm.weights()) == names
    with pytest.raises(RuntimeError, match="prefix cache"):
        llm.generate(REQUESTS)
    llm.reset_prefix_cache()
    llm.generate(REQUESTS)
    assert llm.syncs == [["model.norm.weight"]] and [call.syncs for call in llm.calls] == [1]


def test_a_sleeping_engine_neither_generates_nor_loads_and_level_two_loses_the_weights(world):
    with pytest.raises(ValueError, match="enable_sleep_mode=False"):
        engine(world).sleep()
    llm = engine(world, enable_sleep_mode=True)
    weights = llm.weights()
    llm.sleep(level=1)
    with pytest.raises(RuntimeError, match="asleep"):
        llm.model.load_weights(weights.items())
    llm.wake_up(tags=["weights"])
    with pytest.raises(RuntimeError, match="asleep"):
        llm.generate(REQUESTS)
    llm.wake_up(tags=["kv_cache"])
    llm.generate(REQUESTS)
    llm.sleep(level=2)
    llm.wake_up()
    llm.model.load_weights(list(weights.items())[:-1])
    llm.reset_prefix_cache()
    with pytest.raises(RuntimeError, match="not all were loaded again"):
        llm.generate(REQUESTS)
    llm.model.load_weights(weights.items())
    llm.reset_prefix_cache()
    llm.generate(REQUESTS)


@pytest.mark.parametrize("kwargs", [{"n": 2, "temperature": 0.0}, {"repetition_penalty": 1.1}, {"top_p": 0.0}])
def test_parameters_that_are_wrong_or_missing_here_are_refused(kwargs):
    with pytest.raises(ValueError, match="is wrong, or more than"):
        SamplingParams(**kwargs)
    with pytest.raises(TypeError, match="unexpected keyword"):
        SamplingParams(frequency_penalty=1.0)


def test_nothing_is_left_behind_in_trl_or_the_environment():
    environment, names = dict(os.environ), dict(vars(vllm_generation))
    with standin_vllm():
        assert vllm_generation.LLM is LLM and vllm_generation.is_vllm_available()
        os.environ["RANK"] = "0"
    assert dict(os.environ) == environment and dict(vars(vllm_generation)) == names


def test_the_client_has_the_methods_of_trls_client_with_their_parameters():
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        theirs = inspect.signature(getattr(VLLMClient, name)).parameters
        ours = inspect.signature(method).parameters
        assert set(ours) - {"serves", "params"} <= set(theirs), name
        assert "params" in ours or {n for n, p in theirs.items() if p.default is p.empty} <= set(ours), name


def test_weights_that_a_server_was_not_told_of_are_refused(world):
    client = Client(world, base_url="")
    weight = torch.ones(64)
    with pytest.raises(ValueError, match="announced as"):
        client.update_named_params([("model.norm.weight", "bfloat16", [64])], iter([("model.norm.weight", weight)]))
    client.update_named_params([("model.norm.weight", "float32", [64])], iter([("model.norm.weight", weight)]))
    assert torch.equal(client.llm.weights()["model.norm.weight"], weight)
