"""Parameters of a plan, against closed forms and saved adapters."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_delta.plan.shapes import adapt, find_config, saved_bytes, shapes_of, weights_of
from hf_delta.recipe.peft import build_peft_config
from hf_delta.recipe.source import Node


RECIPES = Path(__file__).parent.parent.parent / "recipes"
QWEN, TULU = "Qwen/Qwen3-1.7B", "allenai/Llama-3.1-Tulu-3-8B-SFT"

# (input, output) of the seven linear layers of a block of Qwen3-1.7B.
LINEAR = [(2048, 2048), (2048, 1024), (2048, 1024), (2048, 2048), (2048, 6144), (2048, 6144), (6144, 2048)]
ROWS = 28 * sum(o for _, o in LINEAR)


def block(**settings):
    return build_peft_config(Node({key: Node(value, "here") for key, value in settings.items()}, "here"), "here")


@pytest.fixture(scope="module")
def qwen():
    return find_config(QWEN, None, RECIPES / "rl" / "delta_l.yaml")[0]


@pytest.mark.parametrize(("name", "parameters"), [(QWEN, 1_720_574_976), (f"{QWEN}-Base", 1_720_574_976), (TULU, 8_030_326_784)])  # fmt: skip
def test_models_have_the_parameters_that_they_are_known_for(name, parameters):
    config, source = find_config(name, None, RECIPES / "rl" / "delta_l.yaml")
    found = weights_of(shapes_of(config, torch.bfloat16))
    assert found.all == found.trained == parameters and found.trained_bytes == 2 * parameters
    assert found.layers * found.layer_values + found.root_values == parameters
    assert found.tied == (name != TULU)
    assert Path(source).is_relative_to(RECIPES / "configs")


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"method": "lora", "r": 16}, 28 * 16 * sum(i + o for i, o in LINEAR)),
        ({"method": "dora", "r": 16}, 28 * 16 * sum(i + o for i, o in LINEAR) + ROWS),
        ({"method": "pmss", "r": 256}, 28 * 7 * 256**2),
        ({"method": "edora", "r": 32}, 28 * 7 * 32**2 + ROWS),
        ({"method": "bone", "r": 64}, 64 * ROWS),
    ],
)
def test_adapters_have_the_parameters_of_their_formulas(qwen, settings, trained):
    model = shapes_of(qwen, torch.bfloat16)
    found = weights_of(adapt(model, block(target_modules="all-linear", **settings)))
    assert found.trained == trained
    assert found.trained_bytes == 4 * trained, "adapters are in float32 on a base in bfloat16"
    # Twice the parameters of the base, which an adapter does not change.
    assert found.frozen_bytes == 2 * 1_720_574_976


def test_weights_of_bitsandbytes(qwen):
    model = adapt(shapes_of(qwen, torch.bfloat16), block(method="lora", r=8))
    four, nested, eight = (weights_of(model, **how) for how in ({"bits": 4}, {"bits": 4, "nested": True}, {"bits": 8}))
    values = 28 * sum(i * o for i, o in LINEAR)
    others = 2 * (1_720_574_976 - values)
    # Half a byte, and a scale in float32 for every 64, or in a byte with one in float32 for every 256 of them.
    assert (four.packed_bytes, four.frozen_bytes) == (values // 2 + values // 64 * 4, four.packed_bytes + others)
    assert nested.packed_bytes == pytest.approx(values / 2 + values / 64 * (1 + 4 / 256), abs=28 * 7)
    # A byte, and a scale in float32 for every row.
    assert (eight.packed_bytes, eight.frozen_bytes) == (values + 4 * ROWS, eight.packed_bytes + others)
    assert four.frozen_values == eight.frozen_values == 1_720_574_976 - values


@pytest.mark.parametrize("method", ["lora", "dora", "pmss", "edora", "bone"])
def test_an_adapter_takes_on_disk_what_is_planned(playground, tmp_path, method):
    config = AutoConfig.from_pretrained(playground / "model")
    peft = block(method=method, r=8, target_modules="all-linear")
    planned = adapt(shapes_of(config, torch.float32), peft)
    real = get_peft_model(AutoModelForCausalLM.from_config(config), peft)
    real.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert saved_bytes(planned) == sum(tensor.nbytes for tensor in written.values())
    # Of PMSS and EDoRA, most of it is frozen, and beside the model while it trains.
    assert weights_of(planned).buffer_bytes == sum(buffer.nbytes for buffer in real.buffers())
    assert (saved_bytes(planned) > 2 * weights_of(planned).trained_bytes) == (method in ("pmss", "edora"))


def test_a_model_takes_on_disk_what_is_planned(qwen):
    # Tied, so that the head is written once.
    assert saved_bytes(shapes_of(qwen, torch.bfloat16)) == 2 * 1_720_574_976
