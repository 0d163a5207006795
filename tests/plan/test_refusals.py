"""What cannot work, as `hf-delta run RECIPE --dry_run` says it: status 2, one line, nothing written."""

import json

import pytest

from hf_delta.errors import InputError
from hf_delta.recipe import load_recipe
from hf_delta.recipe.launch import read_launch
from tests.plan.conftest import PACKAGES, pretend
from tests.running import keys, write


def refused(answer, said):
    assert answer.status == 2 and not answer.out and not answer.new
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), answer.err
    assert said in lines[0]


@pytest.fixture
def planned(dry_run, tmp_path, playground):
    """A dry run of a short recipe on the playground with some keys changed."""

    def plan(trainer, *flags, **changes):
        return dry_run(write(tmp_path, keys(trainer, playground, tmp_path / "out", **changes)), *flags)

    return plan


# -- rank -----------------------------------------------------------------------------------------------------------
def test_a_rank_above_that_of_vllm(planned):
    dora = {"method": "dora", "r": 513, "target_modules": ["gate_proj"]}
    # It can be trained, and merged.
    assert planned("sft", peft_config=dora).status == 0
    hub = {"push_to_hub": True, "push_lora": True, "hub_model_id": "me/mine", "base_model_id": "me/base"}
    refused(
        planned("sft", peft_config=dora, **hub),
        "push_lora: rank 513 is above 512, the largest that vLLM takes: give a rank up to 512",
    )
    patterned = {**dora, "r": 8, "rank_pattern": {"gate_proj": 600}}
    refused(planned("sft", peft_config=patterned, **hub), "push_lora: rank 600 is above 512")
    allowed = planned("sft", peft_config={**dora, "r": 257}, **hub)
    assert allowed.status == 0 and "--max-lora-rank 320 of vLLM" in allowed.out


# -- batches --------------------------------------------------------------------------------------------------------
def test_batches_that_do_not_divide(planned):
    # Two rollouts at a time of groups of four.
    refused(
        planned("grpo", "--num_processes", "1", per_device_train_batch_size=2),
        "generation_batch_size (2) must be divisible by num_generations (4)",
    )
    answer = planned("grpo", "--num_processes", "2", per_device_train_batch_size=2)
    assert answer.status == 0 and "4 at a time, 4 for each of 1 prompt," in answer.out
    refused(
        planned("grpo", generation_batch_size=6, num_generations=3),
        "generation_batch_size (6) must be divisible by the global batch size (4)",
    )


def test_an_epoch_without_a_batch(planned):
    refused(
        planned("grpo", max_train_rows=3, per_device_train_batch_size=16),
        "the data has 3 rows, and a generation batch takes 4 prompts (16 rollouts, num_generations 4): an epoch would be empty. Lower",
    )


# -- adapters -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {"method": "lora", "target_modules": ["q_proj", "query"]},
            "peft_config: target_modules: there is no layer 'query' in the model. Its linear layers are down_proj, gate_proj, k_proj,",
        ),
        (
            {"method": "lora", "target_modules": r".*\.query"},
            r"no layer has a name like '.*\\.query'. Its linear layers are down_proj,",
        ),
        ({"method": "lora", "target_modules": ["input_layernorm"]}, "peft_config: Target module Qwen3RMSNorm"),
        (
            {"method": "pmss", "target_modules": ["input_layernorm"]},
            "peft_config: model.layers.0.input_layernorm: a Qwen3RMSNorm cannot be adapted: name linear layers",
        ),
        (
            {"method": "bone", "target_modules": ["embed_tokens"]},
            "peft_config: model.embed_tokens: a Embedding cannot be adapted: name linear layers",
        ),
        ({"method": "pmss", "r": 65, "target_modules": ["q_proj"]}, "r is 65, and a 64x64 weight has no 65 rows"),
        (
            {"method": "edora", "r": 65, "target_modules": ["q_proj"]},
            "r is 65, and a weight of 64 x 64 has 64 singular vectors",
        ),
    ],
)
def test_adapters_that_do_not_fit_the_model(planned, adapter, said):
    refused(planned("sft", peft_config=adapter), said)


# -- packages -------------------------------------------------------------------------------------------------------
LORA = {"method": "lora", "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("trainer", "changes", "flags", "said"),
    [
        ("grpo", {"use_vllm": True}, [], "vllm is not installed"),
        (
            "sft",
            {"load_in_4bit": True, "peft_config": LORA},
            [],
            "bitsandbytes is not installed: pip install 'hf_delta[quantization]'",
        ),
        ("sft", {"use_liger_kernel": True}, [], "liger_kernel is not installed: pip install liger-kernel"),
        (
            "grpo",
            {"reward_funcs": ["accuracy_reward"]},
            [],
            "accuracy_reward needs math_verify, which is not installed: pip install 'hf_delta[math]'",
        ),
        (
            "sft",
            {"use_cpu": False},
            ["--accelerate_config", "zero3"],
            "zero3.yaml: deepspeed is not installed: pip install 'hf_delta[deepspeed]'",
        ),
    ],
)
def test_packages_that_are_missing(planned, monkeypatch, trainer, changes, flags, said):
    pretend(monkeypatch, absent=PACKAGES)
    refused(planned(trainer, *flags, **changes), said)


# -- models ---------------------------------------------------------------------------------------------------------
EXPERTS = {
    "model_type": "qwen3_moe", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def of_the_hub(dry_run, tmp_path):
    """A dry run for a model of the Hub of which there is a file with shapes, or none."""

    def plan(shapes, **changes):
        if shapes is not None:
            (tmp_path / "configs").mkdir()
            (tmp_path / "configs" / "org--model.json").write_text(
                shapes if isinstance(shapes, str) else json.dumps(shapes)
            )
        recipe = keys("sft", "", "out", model_name_or_path="org/model", dataset_name="org/data", **changes)
        del recipe["playground"], recipe["playground_pretrain_steps"]
        return dry_run(write(tmp_path, recipe))

    return plan


def test_experts_that_are_chosen_by_value(of_the_hub):
    refused(
        of_the_hub({**EXPERTS, "experts_implementation": "eager"}),
        "model_name_or_path: qwen3_moe cannot run on shapes alone, so that its activations cannot be counted and there is no "
        "plan for it (DynamicOutputShapeException: aten.nonzero.default). Run the recipe without dry_run.",
    )


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (None, "For a dry run without network, write its shapes to "),
        ("{", "configs/org--model.json: no configuration of a model"),
        ({"hidden_size": 64}, "configs/org--model.json: no configuration of a model"),
        ({"model_type": "no_such_model"}, "configs/org--model.json: no configuration of a model"),
        (
            {"model_type": "clip_text_model"},
            "no causal language model can be built of the configuration (clip_text_model; ",
        ),
    ],
)
def test_models_that_are_nowhere(of_the_hub, shapes, said):
    refused(of_the_hub(shapes), said)


# -- the rest -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("trainer", "changes", "flags", "said"),
    [
        ("sft", {"train_file": "nowhere.jsonl"}, [], "train_file: nowhere.jsonl does not exist"),
        ("sft", {}, ["--accelerate_config", "fsdp2"], "FSDP2 is for GPUs, and the recipe says use_cpu: true"),
        (
            "grpo",
            {"evaluate_pass_at": [1]},
            ["--accelerate_config", "fsdp2"],
            "evaluate_pass_at needs the whole model",
        ),
        ("sft", {}, ["--accelerate_config", "fsdp"], "accelerate_config: fsdp is no file and none of cpu, ddp, fsdp2"),
        ("sft", {}, ["--num_processes", "0"], "num_processes must be at least 1, got 0"),
        (
            "dpo",
            {"loss_type": "tis_dpo", "token_weights_kwargs": {"positive": "nowhere", "negative": "nowhere"}},
            [],
            "nowhere is no directory. Train that model first",
        ),
    ],
)
def test_what_else_cannot_work(planned, trainer, changes, flags, said):
    refused(planned(trainer, *flags, **changes), said)


def test_a_launch_is_planned_by_a_dry_run_only(tmp_path, playground):
    with pytest.raises(InputError, match="num_processes goes with dry_run alone"):
        load_recipe(str(write(tmp_path, keys("sft", playground, tmp_path / "out"))), ["--num_processes", "2"])


@pytest.mark.parametrize("text", ["a: [", "distributed_type: TPU", "distributed_type: NO\nnum_processes: many", "[]"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="launch.yaml"):
        read_launch(str(path))
