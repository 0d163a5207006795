"""The way of a model through the meta device, on which Accelerate shards it for `fsdp_cpu_ram_efficient_loading`."""

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
