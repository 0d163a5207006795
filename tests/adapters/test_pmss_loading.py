"""PMSS adapters on another base model, and broken files: noticed before anything is computed, whatever loads them."""

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_delta import InputError
from hf_delta.adapters.pmss.functions import probes_distance, skeleton_probes
from tests.adapters.life import base_model, layers, logits
from tests.adapters.test_pmss import adapted


@pytest.fixture
def saved(tmp_path):
    adapted().save_pretrained(tmp_path)
    return tmp_path


REFUSED = r"layers\.0\.self_attn\.q_proj, adapter 'default': the selected rows and columns .* are not those"


def plainly_loaded(folder, seed):
    model = base_model(seed=seed)
    model.load_adapter(str(folder))
    return model


def loaded_into(folder, seed):
    model = adapted(base_model(seed=seed))
    logits(model)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


WAYS = {
    "PeftModel": lambda folder, seed: PeftModel.from_pretrained(base_model(seed=seed), folder),
    "trainable": lambda folder, seed: PeftModel.from_pretrained(base_model(seed=seed), folder, is_trainable=True),
    "low memory": lambda folder, seed: PeftModel.from_pretrained(
        base_model(seed=seed), folder, low_cpu_mem_usage=True
    ),
    "transformers": plainly_loaded,
    "state dict": loaded_into,
}


@pytest.mark.parametrize("way", WAYS)
def test_another_base_model_is_noticed(saved, way):
    assert torch.equal(logits(WAYS[way](saved, 0)), logits(adapted()))
    with pytest.raises(InputError, match=REFUSED):
        logits(WAYS[way](saved, 1))
    if way == "PeftModel":
        with pytest.raises(InputError, match=REFUSED):
            WAYS[way](saved, 1).merge_and_unload()
        with pytest.raises(InputError, match=REFUSED):
            layers(WAYS[way](saved, 1))[0].lora_factors("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_no_other_model_but_five_percent_are(saved, dtype):
    logits(PeftModel.from_pretrained(base_model(dtype), saved))
    generator, moved = torch.Generator().manual_seed(0), base_model(dtype)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.add_(noise, alpha=0.05 * float(parameter.float().std(correction=0)))
    with pytest.raises(InputError, match=REFUSED):
        logits(PeftModel.from_pretrained(moved, saved))


def test_an_adapter_of_a_quantised_base_is_taken_over_the_dense_one_and_no_other():
    """What it was trained on differs from the dense weight by its rounding; `record[2]` says so."""
    layer = layers(adapted())[0]
    saved = skeleton_probes(
        layer.original_weight(), *(b["default"] for b in (layer.hfd_pmss_rows, layer.hfd_pmss_columns))
    )
    found = saved.clone()
    found[1:] += 0.1 * saved[0]
    for quantised in (0.0, 1.0):
        record = torch.cat([torch.tensor([1.0, 1.0, quantised], dtype=torch.float64), found])
        layer.hfd_pmss_record["default"] = record.view(torch.int64)
        layer.unchecked.add("default")
        x = torch.zeros(1, layer.in_features)
        if quantised:
            layer(x)
        else:
            with pytest.raises(InputError, match=REFUSED):
                layer(x)


@pytest.mark.parametrize("quantised_type", ["nf4", "fp4"])
def test_rounding_to_4_bits_is_no_other_model(quantised_type):
    functional = pytest.importorskip("bitsandbytes").functional
    rows, columns = torch.arange(0, 256, 4), torch.arange(1, 256, 4)
    for seed in range(5):
        weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
        rounded = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type=quantised_type))
        other = torch.randn(256, 256, generator=torch.Generator().manual_seed(100 + seed))
        probes = skeleton_probes(weight, rows, columns)
        assert 0.02 < probes_distance(probes, skeleton_probes(rounded, rows, columns)) < 0.25
        assert probes_distance(probes, skeleton_probes(other, rows, columns)) > 0.8


def test_probes_do_not_depend_on_the_version_of_anything():
    """Numbers of a saved adapter must be found again by every later release: here +-81 +-121 +-1 +-9 each."""
    weight = torch.arange(12.0).reshape(3, 4).square()
    probes = skeleton_probes(weight, torch.tensor([2, 0]), torch.tensor([1, 3]))
    assert probes[0].item() == pytest.approx((81**2 + 121**2 + 1 + 9**2) ** 0.5)
    first = [48, 48, -192, -192, -192, -48, 212, 212]
    assert probes[1:].tolist() == [*first, 192, -48, -48, 192, 32, 192, -192, 32]


def broken(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("value", [-3, 48])
def test_indices_out_of_range_are_refused(saved, name, value):
    def change(tensors):
        next(t for n, t in tensors.items() if n.endswith(f"q_proj.hfd_pmss_{name}"))[2] = value

    broken(saved, change)
    with pytest.raises(InputError, match=f"q_proj, adapter 'default': hfd_pmss_{name} goes from .* has 0 to 31"):
        logits(PeftModel.from_pretrained(base_model(), saved))


def test_a_file_without_indices_is_refused(saved):
    def change(tensors):
        for name in [n for n in tensors if "rows" in n or "columns" in n]:
            del tensors[name]

    broken(saved, change)
    with pytest.raises(InputError, match="q_proj, adapter 'default': there is a core but there are no indices"):
        logits(PeftModel.from_pretrained(base_model(), saved))
