"""The way of a model through the meta device, on which Accelerate shards it for `fsdp_cpu_ram_efficient_loading`."""

import warnings

import pytest
import torch

from tests.adapters.life import KINDS, adapted, base_model, logits


@pytest.mark.parametrize("kind", KINDS)
def test_saved_buffers_outlast_the_meta_device(kind):
    """Only parameters are in the state there, each of which Accelerate takes for a sharded one, and only they are loaded."""
    model = adapted(kind).eval()
    expected = logits(model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    has_buffers = kind.startswith(("pmss", "edora", "lora_xs"))
    assert (saved.keys() > names) if has_buffers else (saved.keys() == names)
    model.to("meta")
    assert model.state_dict().keys() == names and all(value.is_meta for value in model.state_dict().values())
    model.load_state_dict({name: saved[name] for name in names}, assign=True)
    # Not persistent, which Accelerate looks after itself.
    rotary = model.get_base_model().model.rotary_emb
    rotary.register_buffer("inv_freq", base_model().model.rotary_emb.inv_freq, persistent=False)
    assert not any(value.is_meta for value in model.state_dict().values())
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in saved.items()
    }
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("pmss", "edora"))])
def test_saved_buffers_come_back_however_a_model_is_filled(kind):
    """Sent there twice, not reached by a load that does not assign, and made empty elsewhere before it is loaded."""
    model = adapted(kind)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: saved[name] for name in names}
    model.to("meta").to("meta")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        model.load_state_dict(parameters)
    assert model.state_dict().keys() == names and all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu").load_state_dict(parameters)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == saved.keys()


def test_saved_buffers_of_a_file_are_taken():
    model = adapted("pmss")
    saved = {name: value + 1 for name, value in model.state_dict().items()}
    model.to("meta").load_state_dict(saved, assign=True)
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
