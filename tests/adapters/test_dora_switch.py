"""Fast DoRA on and off: whose functions run, whose files are written."""

import inspect

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear

from hf_delta._compat import dora as compat
from hf_delta.adapters.dora import disable_fast_dora, enable_fast_dora, layer
from tests.adapters.dora import (
    fast_dora,
    gradients,
    linear_of,
    llama,
    model_of,
    tokens,
)


def test_lora_without_dora_is_peft_s_own(fast, monkeypatch):
    monkeypatch.setattr(layer, "fused_output", lambda *args: pytest.fail("not for LoRA"))
    model, x, dy = model_of(linear_of(), use_dora=False), torch.ones(5, 37), torch.ones(5, 53)
    found = gradients(model, x, dy)
    disable_fast_dora()
    assert all(map(torch.equal, found, gradients(model, x, dy)))


def test_checkpoints_are_peft_s_both_ways(tmp_path):
    with fast_dora():
        model = llama(std=0.2)
        keys, logits = list(model.state_dict()), model(tokens()).logits
        model.save_pretrained(tmp_path)
    assert keys == list(llama().state_dict())
    plain = PeftModel.from_pretrained(llama().unload(), tmp_path)
    expected = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in expected.items())
    torch.testing.assert_close(plain(tokens()).logits, logits, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path / "again")
    with fast_dora():
        back = PeftModel.from_pretrained(llama().unload(), tmp_path / "again", low_cpu_mem_usage=True)
        assert all(torch.equal(back.state_dict()[k], v) for k, v in expected.items())
        assert torch.equal(back(tokens()).logits, logits)


@pytest.mark.parametrize("seam", compat.SEAMS)
def test_signatures_are_the_recorded_ones(seam):
    owner, method = seam.split(".")
    if owner not in compat.classes():
        pytest.skip("bitsandbytes is not installed")
    found = tuple(inspect.signature(vars(compat.classes()[owner])[method]).parameters)
    assert found == compat.SEAMS[seam], f"PEFT or transformers changed {seam}: see hf_delta/_compat/dora.py"


def test_on_twice_and_off_gives_the_same_functions_back():
    def functions():
        return {seam: vars(compat.classes()[seam.split(".")[0]])[seam.split(".")[1]] for seam in compat.SEAMS}

    before = functions()
    enable_fast_dora()
    during = functions()
    enable_fast_dora(cache=False)
    assert functions() == during and not set(during.values()) & set(before.values())
    assert [inspect.signature(f) for f in during.values()] == [inspect.signature(f) for f in before.values()]
    disable_fast_dora()
    disable_fast_dora()
    assert functions() == before
    assert "train" in vars(DoraLinearLayer) and "unmerge" in vars(Linear)
