"""Means of activations against models computed by hand."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_delta.errors import InputError
from hf_delta.preference.weights.activations import KINDS, activation_means


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.mark.parametrize("build", [llama, gpt2])
def test_residual_means_are_those_of_the_hidden_states(build):
    model = build()
    with activation_means(model, ["residual"]) as means, torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    # Hidden states end with the normalised output; the layers before are as they leave their layer.
    assert len(means["residual"]) == len(states) - 1
    for ours, theirs in zip(means["residual"][:-1], states[1:-1], strict=True):
        torch.testing.assert_close(ours, theirs.mean(-1))
    assert not torch.equal(means["residual"][-1], means["residual"][-2])


def test_kinds_of_llama_are_recomputed_from_its_weights():
    model = llama()
    with activation_means(model) as means, torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    assert {kind: len(layers) for kind, layers in means.items()} == dict.fromkeys(KINDS, 3)
    assert all(
        layer.shape == IDS.shape and layer.dtype == torch.float32 for layers in means.values() for layer in layers
    )
    layer = model.model.layers[0]
    attended = []
    handle = layer.self_attn.register_forward_hook(lambda module, inputs, output: attended.append(output[0]))
    with torch.no_grad():
        model(IDS)
        handle.remove()
        inputs = layer.input_layernorm(states[0])
        for kind in "qkv":
            weight = getattr(layer.self_attn, f"{kind}_proj").weight
            torch.testing.assert_close(means[kind][0], (inputs @ weight.T).mean(-1))
        # Output projection and its result give what went into it.
        before = torch.linalg.solve(layer.self_attn.o_proj.weight, attended[0].mT).mT
        torch.testing.assert_close(means["v_out"][0], before.mean(-1), rtol=1e-3, atol=1e-5)
        inputs = layer.post_attention_layernorm(states[0] + attended[0])
        gated = torch.nn.functional.silu(inputs @ layer.mlp.gate_proj.weight.T) * (inputs @ layer.mlp.up_proj.weight.T)
    torch.testing.assert_close(means["mlp"][0], gated.mean(-1))


def test_fused_projections_of_gpt2_are_taken_apart():
    model = gpt2()
    with activation_means(model) as means, torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        block = model.transformer.h[0]
        parts = block.attn.c_attn(block.ln_1(states[0])).split(16, dim=-1)
    for kind, part in zip("qkv", parts, strict=True):
        torch.testing.assert_close(means[kind][0], part.mean(-1))
    with torch.no_grad():
        after = block.mlp.act(block.mlp.c_fc(block.ln_2(states[0] + block.attn(block.ln_1(states[0]))[0])))
    torch.testing.assert_close(means["mlp"][0], after.mean(-1))


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = llama()
    with pytest.raises(RuntimeError, match="mine"), activation_means(model) as means:
        raise RuntimeError("mine")
    with torch.no_grad():
        model(IDS)
    assert not any(means.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_adapters_count_if_they_are_active():
    from peft import LoraConfig, get_peft_model

    base = llama()
    with activation_means(base) as expected, torch.no_grad():
        base(IDS)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    with activation_means(model) as off, torch.no_grad(), model.disable_adapter():
        model(IDS)
    with activation_means(model) as on, torch.no_grad():
        model(IDS)
    for kind in KINDS:
        assert len(off[kind]) == len(on[kind]) == 3
        torch.testing.assert_close(off[kind], expected[kind])
        assert not torch.allclose(on[kind][0], off[kind][0])


def test_unknown_modules_are_refused():
    with pytest.raises(InputError, match="Linear has no modules of the kind 'mlp'"):
        with activation_means(torch.nn.Linear(2, 2)):
            pass
    with pytest.raises(InputError, match="no kind 'logits'"):
        with activation_means(llama(), ["logits"]):
            pass
