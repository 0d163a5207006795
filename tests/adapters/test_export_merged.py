"""Adapters merged file by file: layout, names, tied weights, dtypes and memory."""

import copy
import gc
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from hf_delta import BoneConfig, PmssConfig
from hf_delta.adapters.export import Quantization, export_merged, merged
from hf_delta.adapters.export.disk import empty_model
from tests.adapters.life import adapted, base_model, gpt2_model, logits


LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
EXTRAS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "saved_embedding": {"modules_to_save": ["embed_tokens"]},
    "saved_norm": {"modules_to_save": ["input_layernorm"]},
    "biases": {"bias": "all"},
    "biases_of_lora": {"target_modules": ["q_proj"], "lora_bias": True},
}
UNTIED = {"head", "embedding", "saved_head", "saved_embedding"}


def trained(model, config, std=0.05):
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def loaded(path, **kwargs):
    model, said = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    return model


def tensors(path):
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture
def written(tmp_path):
    """Saves a base model and an adapter, and merges them; returns the directory of the result."""

    def write(model, base, shard="20KB", **options):
        base.save_pretrained(tmp_path / "base", max_shard_size=shard)
        model.save_pretrained(tmp_path / "adapter")
        return export_merged(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base", **options)

    return write


@pytest.mark.parametrize("extra", EXTRAS)
def test_everything_that_an_adapter_can_train_is_merged(extra, written):
    model = trained(base_model(), LoraConfig(**{**LORA, **EXTRAS[extra]}))
    expected = logits(model)
    merged_model = loaded(written(model, base_model()))
    assert (expected - logits(base_model())).abs().max() > 1e-3
    assert torch.allclose(logits(merged_model), expected, atol=1e-5)
    assert merged_model.config.tie_word_embeddings == (extra not in UNTIED)


@pytest.mark.parametrize("extra", sorted(UNTIED))
def test_untied_models_too(extra, written):
    def base():
        model = base_model()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() + 0.01)
        return model

    model = trained(base(), LoraConfig(**{**LORA, **EXTRAS[extra]}))
    assert torch.allclose(logits(loaded(written(model, base()))), logits(model), atol=1e-5)


def test_the_files_are_those_of_the_base_model(written, tmp_path):
    base, model = base_model(), adapted("bone", target_modules=["q_proj"])
    out = written(model, base)
    before, after = (
        json.loads((path / "model.safetensors.index.json").read_text()) for path in (tmp_path / "base", out)
    )
    assert before["weight_map"] == after["weight_map"] and len(set(after["weight_map"].values())) > 2
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    old, new = tensors(tmp_path / "base"), tensors(out)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.endswith("q_proj.weight")}
    assert (out / "config.json").read_text() == (tmp_path / "base" / "config.json").read_text()
    assert not list(tmp_path.glob(".*"))


def test_a_base_of_one_file(written):
    model = adapted("pmss")
    out = written(model, base_model(), shard="1GB")
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.allclose(logits(loaded(out)), logits(model), atol=1e-5)


def test_transposed_layers(written):
    model = adapted("edora", gpt2_model(), target_modules=["c_attn", "c_fc"]).eval()
    assert torch.allclose(logits(loaded(written(model, gpt2_model()))), logits(model), atol=1e-5)


def test_a_checkpoint_with_other_names_than_the_model(written, tmp_path):
    """Vision-language models are stored with `model.layers` for what they call `model.language_model.layers`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {
        **sizes,
        "intermediate_size": 48,
        "vocab_size": 24,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    model = trained(copy.deepcopy(base), LoraConfig(r=4, target_modules=r".*language_model.*(q|o)_proj"))
    out = written(model, base)
    assert (
        "model.layers.0.self_attn.q_proj.weight" in tensors(out)
        and tensors(out).keys() == tensors(tmp_path / "base").keys()
    )
    result = Qwen2_5_VLForConditionalGeneration.from_pretrained(out)
    assert torch.allclose(logits(result), logits(model), atol=1e-5) and not torch.allclose(
        logits(base), logits(model), atol=1e-3
    )


@pytest.mark.parametrize("asked", [None, torch.float32])
def test_one_rounding_to_the_dtype_of_the_base(asked, written, tmp_path):
    model = adapted("bone", base_model(torch.bfloat16), target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.original_weight().float() + layer.delta_weight("default", layer.original_weight())
    out = written(model, base_model(torch.bfloat16), dtype=asked)
    new = tensors(out)
    assert {t.dtype for t in new.values()} == {asked or torch.bfloat16}
    assert torch.equal(new["model.layers.0.self_attn.q_proj.weight"], exact.to(asked or torch.bfloat16))
    said = json.loads((out / "config.json").read_text())["dtype"]
    assert said == ("float32" if asked else "bfloat16")
    assert torch.equal(new["model.norm.weight"].float(), tensors(tmp_path / "base")["model.norm.weight"].float())


def test_the_tokenizer_comes_from_the_adapter_or_else_from_the_base(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    adapted("bone").save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "run.json", "code.py"):
        (tmp_path / "base" / name).write_text('{"of": "base"}')
    first = export_merged(tmp_path / "adapter", tmp_path / "first", base=tmp_path / "base")
    assert (first / "chat_template.jinja").read_text() == '{"of": "base"}'
    assert not (first / "run.json").exists() and not (first / "code.py").exists()
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"of": "adapter"}')
    second = export_merged(tmp_path / "adapter", tmp_path / "second", base=tmp_path / "base")
    assert (second / "tokenizer.json").read_text() == '{"of": "adapter"}'
    assert not (second / "chat_template.jinja").exists()
    assert (second / "generation_config.json").exists()


def live_bytes():
    """Bytes of the tensors that Python holds and that were made since `gc.freeze`, each memory once."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("kind", ["lora", "bone", "pmss", "dora"])
def test_memory_is_one_file_and_one_module(kind, tmp_path, monkeypatch):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=16,
        num_attention_heads=4,
        vocab_size=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="250KB")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = {
        "bone": BoneConfig(r=4),
        "pmss": PmssConfig(r=4),
        "dora": LoraConfig(r=4, use_dora=True),
        "lora": LoraConfig(r=4),
    }
    made[kind].target_modules, made[kind].task_type = {"q_proj", "down_proj"}, "CAUSAL_LM"
    get_peft_model(base, made[kind]).save_pretrained(tmp_path / "adapter")
    files = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    del base
    gc.collect()
    gc.freeze()
    seen = []

    def watched(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.append(live_bytes())
            return result

        return call

    monkeypatch.setattr(merged, "save_file", watched(merged.save_file))
    monkeypatch.setattr(merged, "merged_parameters", watched(merged.merged_parameters))
    try:
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    finally:
        gc.unfreeze()
    module = 4 * 64 * 128
    assert len(seen) >= 32 + len(files) and len(files) >= 8
    assert max(seen) <= max(files) + 2 * adapter + 4 * module < sum(files) / 3


@pytest.mark.parametrize("quantised", [False, True])
def test_a_model_without_weights_takes_no_memory(quantised, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    gc.freeze()
    try:
        model = empty_model(tmp_path / "base")
        if quantised:
            pytest.importorskip("bitsandbytes")
            names = Quantization(load_in_4bit=True).quantised_modules(model)
            assert "model.layers.0.mlp.up_proj" in names and "lm_head" not in names
        assert 0 < live_bytes() < 1000
    finally:
        gc.unfreeze()
