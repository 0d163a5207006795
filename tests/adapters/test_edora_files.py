"""EDoRA: files, other base models, several adapters, and input that is refused."""

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_delta import EdoraConfig
from hf_delta.errors import InputError
from tests.adapters.life import IDS, adapted, base_model, layers, logits


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_factors_come_from_the_file(tmp_path, magnitude, low_cpu_mem_usage):
    model = adapted("edora", magnitude=magnitude)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {name.split(".hfd_edora_")[1].split(".")[0] for name in tensors}
    assert kinds == {"core", "left", "right"} | ({"magnitude", "norm"} if magnitude else set())
    # The same change in a rotated basis, which no decomposition of the weight would return.
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    for name in tensors:
        if name.endswith("core.weight"):
            tensors[name] = turn.T @ tensors[name] @ turn
        elif name.endswith("left"):
            tensors[name] = tensors[name] @ turn
        elif name.endswith("right"):
            tensors[name] = turn.T @ tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    found = peft.get_peft_model_state_dict(loaded)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_another_base_model_is_refused_and_a_rounded_one_is_not(tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    adapted("edora").save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(base_model(seed=1), tmp_path)
    with pytest.raises(InputError, match="another base model"):
        other(input_ids=IDS)
    base = base_model()
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.Linear) and module is not base.lm_head:
                blocks = quantize_4bit(module.weight.reshape(-1, 64), blocksize=64, quant_type="fp4")
                module.weight.copy_(dequantize_4bit(*blocks).view_as(module.weight))
    assert logits(PeftModel.from_pretrained(base, tmp_path)).isfinite().all()


def test_a_file_without_factors_is_refused(tmp_path):
    adapted("edora").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "left" not in n and "right" not in n},
        tmp_path / "adapter_model.safetensors",
    )
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    with pytest.raises(InputError, match="incomplete"):
        loaded(input_ids=IDS)


@pytest.mark.parametrize("missing", ["magnitude", "norm"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_without_magnitudes_is_refused(tmp_path, missing, low_cpu_mem_usage):
    adapted("edora").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {n: t for n, t in tensors.items() if f"hfd_edora_{missing}" not in n}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises((InputError, RuntimeError), match="magnitudes or the norms|Missing|missing|meta"):
        loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded(input_ids=IDS)


def test_a_second_adapter_has_the_factors_of_an_equal_first():
    model = adapted("edora", svd_niter=0)
    first = layers(model)[0]
    with torch.no_grad():
        first.hfd_edora_left["default"].neg_()
        first.hfd_edora_right["default"].neg_()
    model.add_adapter("ref", EdoraConfig(r=4, target_modules="all-linear", svd_niter=0, task_type="CAUSAL_LM"))
    model.add_adapter("other", EdoraConfig(r=4, target_modules="all-linear", svd="full", task_type="CAUSAL_LM"))
    left = first.hfd_edora_left
    assert torch.equal(left["ref"], left["default"]) and left["ref"].data_ptr() != left["default"].data_ptr()
    assert not torch.equal(left["other"], left["default"])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"sigma": -1}, "sigma is -1"),
        ({"svd": "fast"}, "full, lowrank"),
        ({"svd_niter": -1}, "svd_niter is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"magnitude": "no"}, "LoRA-XS"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"r": 0}, "r is 0"),
    ],
)
def test_wrong_fields_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        EdoraConfig(**fields)


def test_r_larger_than_the_layer_is_refused():
    with pytest.raises(InputError, match=r"0: r is 11, and a weight of 10 x 12 has 10 singular vectors"):
        get_peft_model(nn.Sequential(nn.Linear(12, 10)), EdoraConfig(r=11, target_modules=["0"]))


def test_the_configuration_is_json(tmp_path):
    EdoraConfig(r=4, magnitude=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["magnitude"], saved["svd"]) == ("HFD_EDORA", 4, False, "lowrank")
