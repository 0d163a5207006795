"""Exports of adapters that were trained over bitsandbytes layers, which run on a CPU: NF4, FP4 and int8."""

import json

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_delta import PmssConfig
from hf_delta.adapters.export import Quantization, export_lora, export_merged
from tests.adapters.life import logits
from tests.adapters.test_export_merged import LORA, loaded, trained


pytest.importorskip("bitsandbytes")

BITS = {
    "nf4": Quantization(load_in_4bit=True),
    "nf4_nested": Quantization(load_in_4bit=True, use_bnb_nested_quant=True),
    "fp4": Quantization(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": Quantization(load_in_8bit=True),
}


class Quantised:
    """A Llama in a directory, and the same loaded with quantised layers."""

    def __init__(self, path, bits):
        self.path, self.bits = path, bits
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=24, pad_token_id=0))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 5 if parameter.ndim == 2 else 1
        model.save_pretrained(path)

    def load(self):
        settings = {"load_in_4bit": self.bits.load_in_4bit, "load_in_8bit": self.bits.load_in_8bit}
        if self.bits.load_in_4bit:
            settings["bnb_4bit_quant_type"] = self.bits.bnb_4bit_quant_type
            settings["bnb_4bit_use_double_quant"] = self.bits.use_bnb_nested_quant
            settings["bnb_4bit_compute_dtype"] = torch.float32
        config = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(
            self.path, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )


def train_mode_logits(model):
    """In evaluation mode bitsandbytes computes in bfloat16 on some CPUs."""
    return logits(model.train())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("config", [LoraConfig(**LORA), PmssConfig(**LORA), LoraConfig(**LORA, use_dora=True)])
def test_what_was_trained_on_quantised_weights_is_merged_into_their_dense_values(bits, config, tmp_path):
    base = Quantised(tmp_path / "base", BITS[bits])
    model = trained(base.load(), config)
    expected = train_mode_logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base.load().save_pretrained(tmp_path / "stored")
    right = export_merged(tmp_path / "adapter", tmp_path / "right", base=tmp_path / "base", quantization=BITS[bits])
    stored = export_merged(tmp_path / "adapter", tmp_path / "from_stored", base=tmp_path / "stored")
    for path in (right, stored):
        plain = loaded(path)
        assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
        assert torch.allclose(train_mode_logits(plain), expected, atol=1e-4)
        assert "quantization_config" not in json.loads((path / "config.json").read_text())
    lora = export_lora(tmp_path / "adapter", base=tmp_path / "base", quantization=BITS[bits], rank=64)
    assert lora.max_error < 1e-5
    wrong = export_merged(tmp_path / "adapter", tmp_path / "wrong", base=tmp_path / "base")
    assert not torch.allclose(train_mode_logits(loaded(wrong)), expected, atol=1e-2)


def test_a_run_says_how_its_base_was_loaded(tmp_path):
    base = Quantised(tmp_path / "base", BITS["nf4_nested"])
    model = trained(base.load(), LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "run" / "checkpoint-4")
    values = {"load_in_4bit": True, "use_bnb_nested_quant": True, "learning_rate": 1e-4}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"values": values}))
    out = export_merged(tmp_path / "run" / "checkpoint-4", tmp_path / "merged", base=tmp_path / "base")
    assert torch.allclose(train_mode_logits(loaded(out)), train_mode_logits(model), atol=1e-4)
