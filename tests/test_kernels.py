"""TRL's kernels with our contract, and the heads of models as transformers computes them."""

import inspect

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Qwen3Config,
)

from hf_delta._compat import kernels
from hf_delta.errors import InputError
from hf_delta.ops.token_kl import token_logps_and_kl


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "tied": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "untied": lambda: Qwen3Config(**SIZES, tie_word_embeddings=False),
    "soft-cap": lambda: Gemma2Config(**SIZES, final_logit_softcapping=0.3),
    "logit_scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "logits_scaling": lambda: GraniteConfig(**SIZES, logits_scaling=5.0),
    "neither": lambda: GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_those_of_the_models(name):
    """Log-probabilities and KL from hidden states against the logits that the models give themselves."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(MODELS[name]()).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)
        models.append(model)
    tokens = torch.arange(3, 15).view(2, 6)
    targets = tokens.flatten()
    policy, reference = (model(tokens).logits.detach().flatten(0, 1).log_softmax(-1) for model in models)
    hidden, ref_hidden = (model.base_model(tokens).last_hidden_state.detach().flatten(0, 1) for model in models)
    arguments = kernels.head_arguments(models[0]) | kernels.head_arguments(models[1], "ref_")
    for compute in (token_logps_and_kl, kernels.trl_logps_and_kl):
        found = compute(hidden, targets=targets, ref_hidden=ref_hidden, **arguments)
        torch.testing.assert_close(found.logps, policy.gather(1, targets[:, None]).squeeze(1))
        torch.testing.assert_close(found.ref_logps, reference.gather(1, targets[:, None]).squeeze(1))
        truth = (reference.exp() * (reference - policy)).sum(1)
        assert truth.min() > 1e-4
        torch.testing.assert_close(found.kl, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_both_kernels_give_the_same_gradients(trained):
    found = []
    for compute in (token_logps_and_kl, kernels.trl_logps_and_kl):
        torch.manual_seed(0)
        hidden, ref_hidden = torch.randn(9, 16, requires_grad=True), torch.randn(9, 24)
        head = torch.randn(300, 16, requires_grad=trained)
        settings = {"bias": torch.randn(300, requires_grad=trained), "softcap": 5.0, "logit_scale": 0.5}
        settings |= {"ref_head_weight": torch.randn(300, 24), "ref_bias": torch.randn(300), "ref_logit_scale": 2.0}
        scores = compute(hidden, head, torch.arange(9), ref_hidden=ref_hidden, temperature=1.5, **settings)
        (scores.logps.sum() + scores.kl.square().sum()).backward()
        grads = [hidden.grad, head.grad, settings["bias"].grad]
        found.append([*(score.detach() for score in scores[:3]), *(grad for grad in grads if grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_choice_of_the_kernel(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(kernels, "_use_triton", lambda device: device.type == "cuda")
    trl, ours = kernels.trl_logps_and_kl, token_logps_and_kl
    choose = kernels.scores_function
    assert [choose("trl", cpu, False), choose("trl", cuda, False), choose("trl", cuda, True)] == [trl] * 3
    # Where TRL's costs more than all logits at once.
    assert choose("trl", cpu, True) is ours
    assert {choose("chunked", device, kl) for device in (cpu, cuda) for kl in (False, True)} == {ours}
    with pytest.raises(InputError, match="'liger' is none of trl, chunked"):
        choose("liger", cpu, False)


@pytest.mark.parametrize("function", kernels.SEAMS, ids=lambda function: function.__name__)
def test_signatures_are_the_recorded_ones(function):
    parameters = tuple(inspect.signature(function.forward).parameters)
    assert parameters == kernels.SEAMS[function], f"TRL changed {function.__name__}: see hf_delta/_compat/kernels.py"
