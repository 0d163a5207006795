"""Adapters by name in recipes: every method under every trainer, and what a wrong block is told."""

import json

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_delta
from hf_delta import InputError
from hf_delta.adapters import ADAPTERS
from hf_delta.recipe import load_recipe
from tests.running import keys, length, train, write


METHODS = {
    "dora": {"method": "dora", "r": 4},
    "bone": {"method": "bone", "r": 8},
    "bat": {"method": "bone", "mode": "bat_row", "r": 8},
    "pmss": {"method": "pmss", "r": 16},
    "edora": {"method": "edora", "r": 8},
    "lora_xs": {"method": "edora", "r": 8, "magnitude": False},
}


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_under_every_trainer(tmp_path, playground, name, trainer):
    block = {**METHODS[name], "target_modules": "all-linear"}
    reward = {"reward_funcs": [f"{__name__}.length"]} if trainer == "grpo" else {}
    out = train(tmp_path, keys(trainer, playground, tmp_path / "out", peft_config=block, learning_rate=1e-2, **reward))
    assert length  # named by the recipe
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    if trainer == "dpo":
        assert state["log_history"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    # What was saved loads and differs from the base model.
    base = AutoModelForCausalLM.from_pretrained(playground / "model")
    ids = torch.arange(1, 9)[None]
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, out)(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-4)
    card = (out / "README.md").read_text()
    assert ("import hf_delta" in card and "hf-delta export" in card) == (name != "dora")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("name", ["dora", "bat", "pmss", "edora"])
def test_every_method_trains_over_a_4_bit_model(tmp_path, playground, name, trainer):
    pytest.importorskip("bitsandbytes")
    block = {**METHODS[name], "target_modules": "all-linear"}
    reward = {"reward_funcs": [f"{__name__}.length"]} if trainer == "grpo" else {}
    out = train(tmp_path, keys(trainer, playground, tmp_path / "out", peft_config=block, load_in_4bit=True, **reward))
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, playground, name):
    block = {**METHODS[name], "target_modules": "all-linear"}
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    straight = train(tmp_path, keys("sft", playground, tmp_path / "out", peft_config=block, **changes))
    flags = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(straight / "checkpoint-2")]
    again = train(tmp_path, keys("sft", playground, tmp_path / "out", peft_config=block, **changes), *flags)
    assert json.loads((again / "trainer_state.json").read_text())["global_step"] == 4
    expected, found = (load_file(out / "adapter_model.safetensors") for out in (straight, again))
    early = load_file(straight / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not torch.equal(early[n], expected[n]) for n in expected)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_method_goes_by_its_short_name_and_by_its_name_in_peft(tmp_path, playground, name):
    for method in (name, f"hfd_{name}", name.upper()):
        block = {"method": method, "r": 4}
        recipe = load_recipe(str(write(tmp_path, keys("sft", playground, tmp_path / "out", peft_config=block))))
        assert recipe.peft == ADAPTERS[name][0](r=4, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    "block,said",
    [
        ("{method: pmms, r: 4}", "peft_config has no method 'pmms'; did you mean 'pmss'"),
        ("{method: pmss, rank: 4}", "peft_config has no key 'rank' for method pmss; write r."),
        ("{method: bone, mode: bat}", "mode is 'bat'"),
        ("{method: pmss, selection: best}", "selection is 'best'"),
        ("{method: edora, r: 0}", "r is 0: write a whole number from 1 up"),
        ("{method: edora, r: many}", "r must be a whole number, got"),
        ("{method: bone, dropout: 1.0}", "dropout is 1.0: write a number from 0 up to"),
        ("{method: dora, use_dora: false}", "method: dora means use_dora: True; leave it out."),
    ],
)
def test_wrong_blocks(tmp_path, playground, block, said):
    content = "\n".join(
        f"{key}: {json.dumps(value)}" for key, value in keys("sft", playground, tmp_path / "out").items()
    )
    with pytest.raises(InputError) as refusal:
        load_recipe(str(write(tmp_path, f"{content}\npeft_config: {block}\n")))
    assert said in str(refusal.value) and str(refusal.value).startswith(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    "block,said",
    [
        ({"method": "pmss", "r": 4096}, "r is 4096"),
        ({"method": "bone", "mode": "bat_row", "r": 7}, "7"),
        ({"method": "edora", "r": 4096}, "r is 4096"),
        ({"method": "pmss", "r": 4, "target_modules": ["q_projj"]}, "q_projj"),
        ({"method": "bone", "r": 4, "target_modules": ["embed_tokens"]}, "a Embedding cannot be adapted"),
    ],
)
def test_blocks_that_do_not_fit_the_model(tmp_path, playground, block, said):
    with pytest.raises(InputError, match=said) as refusal:
        train(
            tmp_path, keys("sft", playground, tmp_path / "out", peft_config={"target_modules": "all-linear", **block})
        )
    assert "\n" not in str(refusal.value)


def test_public_names():
    assert hf_delta.PmssConfig(r=3).peft_type == peft.PeftType["HFD_PMSS"]
    assert {hf_delta.BoneConfig, hf_delta.EdoraConfig} <= {config for config, _ in ADAPTERS.values()}
