"""Adapters over bitsandbytes layers, which run on a CPU: NF4, FP4 and int8."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.adapters.life import IDS, KINDS, config_of, layers, logits, perturb


pytest.importorskip("bitsandbytes")
FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_format = pytest.mark.parametrize("bits", FORMATS)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=24,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def quantised(base_dir, bits, dtype=torch.float32):
    settings = dict(FORMATS[bits])
    if "load_in_4bit" in settings:
        settings["bnb_4bit_compute_dtype"] = dtype
    return AutoModelForCausalLM.from_pretrained(
        base_dir, quantization_config=BitsAndBytesConfig(**settings), dtype=dtype, device_map="cpu"
    )


def adapted(base_dir, bits, kind, **changes):
    # Norms of rows and columns of this base are small, and PMSS multiplies by them.
    std = 2.0 if kind == "pmss" else 0.05
    return perturb(get_peft_model(quantised(base_dir, bits), config_of(kind, **changes)), std=std)


def assert_near(found, expected, base):
    """Closer than a tenth of what the adapter changes: kernels round inputs to 8 bits, or products to bfloat16."""
    assert (found - expected).norm() < 0.1 * (expected - base).norm()


@every_kind
@every_format
def test_training_moves_the_adapter_and_nothing_else(base_dir, kind, bits):
    model = get_peft_model(quantised(base_dir, bits), config_of(kind))
    assert torch.allclose(logits(model), logits(quantised(base_dir, bits)), atol=1e-6)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@every_kind
@every_format
def test_the_output_is_that_of_the_changed_dequantised_weight(base_dir, kind, bits):
    model = adapted(base_dir, bits, kind)
    layer = next(layer for layer in layers(model) if layer.in_features != layer.out_features)
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0))
    weight = layer.original_weight().float()
    expected = nn.functional.linear(x, weight + layer.delta_weight("default", weight))
    plain = layer.base_layer(x)
    found = layer(x)
    # The kernels round too: inputs to 8 bits, or products to bfloat16.
    kernel = (plain - nn.functional.linear(x, weight)).norm()
    assert kernel < 0.02 * plain.norm() and (plain - expected).norm() > 2 * kernel
    assert (found - expected).norm() < 1.2 * kernel + 1e-5


@every_kind
@every_format
def test_merging_gives_a_dense_copy_and_unmerging_the_quantised_layer(base_dir, kind, bits):
    model = adapted(base_dir, bits, kind)
    expected = logits(model)
    before = dict(model.named_modules())
    stored = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    merged = [layer.base_layer for layer in layers(model)]
    assert all(type(m) is nn.Linear and m.weight.is_floating_point() for m in merged)
    assert_near(logits(model), expected, logits(quantised(base_dir, bits)))
    model.unmerge_adapter()
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in after)
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), expected)


@every_kind
@every_format
def test_saved_and_loaded_on_a_quantised_base(base_dir, kind, bits, tmp_path):
    model = adapted(base_dir, bits, kind)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(quantised(base_dir, bits), tmp_path)), expected)


@every_kind
def test_half_precision_computation_over_4_bits(base_dir, kind):
    model = perturb(get_peft_model(quantised(base_dir, "nf4", torch.bfloat16), config_of(kind)))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_kind
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_merged_unloaded_and_saved_it_is_not_quantised_again(base_dir, kind, targets, tmp_path):
    model = adapted(base_dir, "nf4", kind, target_modules=targets)
    expected = logits(model)
    plain = model.merge_and_unload()
    merged = logits(plain)
    assert not layers(plain)
    assert_near(merged, expected, logits(quantised(base_dir, "nf4")))
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    block = again.model.layers[0]
    assert type(block.mlp.up_proj) is type(block.self_attn.q_proj) is type(again.lm_head) is nn.Linear
    assert (type(block.mlp.down_proj) is nn.Linear) == (targets == "all-linear")
    assert torch.allclose(logits(again), merged, atol=1e-2 if targets != "all-linear" else 1e-6)


@every_kind
@every_format
def test_a_merged_layer_keeps_its_bias(kind, bits, tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=24,
        attention_bias=True,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.uniform_(1, 2)
    model.save_pretrained(tmp_path)
    layer = layers(adapted(str(tmp_path), bits, kind, target_modules=["q_proj"]))[0]
    bias = layer.base_layer.bias.clone()
    layer.merge()
    assert type(layer.base_layer) is nn.Linear and bias.min() > 0.9
    assert torch.equal(layer(torch.zeros(1, 64))[0], bias)


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_the_weight_of_a_4_bit_layer_that_was_packed_for_the_processor(base_dir, bits):
    model = adapted(base_dir, bits, "bone").eval()
    before = [layer.original_weight() for layer in layers(model)]
    logits(model)
    packed = [layer.base_layer.weight.quant_state for layer in layers(model)]
    if not all(getattr(state, "packing_format_for_cpu", False) for state in packed):
        pytest.skip("bitsandbytes packs weights on processors with AVX512-BF16 only")
    for layer, weight in zip(layers(model), before):
        data = layer.base_layer.weight.data.clone()
        # Scales are rounded to bfloat16.
        assert (layer.original_weight().float() - weight).abs().max() < 2**-8 * weight.abs().max()
        assert torch.equal(layer.base_layer.weight.data, data)
