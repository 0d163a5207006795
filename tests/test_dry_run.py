"""`--dry_run`: parameters against closed forms, memory against real tensors and the ZeRO paper, steps against samplers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft import get_peft_model
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import RepeatSampler

import hf_delta.train
from hf_delta._compat.live import LiveBytes
from hf_delta.errors import InputError
from hf_delta.plan.lengths import Lengths, local_tokenizer, measure
from hf_delta.plan.memory import Activations, Head, Rollouts, Step, Weights, estimate, state_bytes
from hf_delta.plan.report import described, size
from hf_delta.plan.run import dry_run
from hf_delta.plan.shapes import adapt, find_config, shapes_of, weights_of
from hf_delta.plan.steps import checkpoints, pair_batches, rollout_batches
from hf_delta.plan.trace import Pass, activations
from hf_delta.recipe import list_recipes, load_recipe
from hf_delta.recipe.find import find_recipe
from hf_delta.recipe.launch import read_launch
from hf_delta.recipe.peft import build_peft_config
from hf_delta.recipe.source import Node, read_recipe
from tests.running import keys, write


FIND_SPEC = importlib.util.find_spec
RECIPES = Path(__file__).parent.parent / "recipes"
HUB = [name for name in list_recipes() if "model_name_or_path" in read_recipe(find_recipe(name))]
QWEN, TULU = "Qwen/Qwen3-1.7B", "allenai/Llama-3.1-Tulu-3-8B-SFT"


def planned(*flags):
    return dry_run(load_recipe(flags[0], [*flags[1:], "--dry_run"]))


def plan_of(folder, content, *flags):
    return planned(str(write(folder, content)), *flags)


def refusal(folder, content, *flags):
    with pytest.raises(InputError) as caught:
        plan_of(folder, content, *flags)
    return str(caught.value)


# -- parameters -----------------------------------------------------------------------------------------------------
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


def test_weights_in_four_bits(qwen):
    found = weights_of(adapt(shapes_of(qwen, torch.bfloat16), block(method="lora", r=8)), bits=4)
    packed = 28 * sum(i * o for i, o in LINEAR)
    assert found.frozen_bytes == packed // 2 + packed // 64 * 4 + 2 * (1_720_574_976 - packed)


# -- recipes --------------------------------------------------------------------------------------------------------
@pytest.fixture
def equipped(tmp_path, monkeypatch):
    """Packages that recipes want, as far as a dry run looks, and the files that they name, in an own directory."""
    wanted = ("vllm", "math_verify", "deepspeed", "bitsandbytes")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name in wanted else FIND_SPEC(name, *a)
    )
    monkeypatch.setattr("hf_delta.plan.run.resolve_reward", lambda entry: entry)
    monkeypatch.chdir(tmp_path)
    for name in ("positive", "negative"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    row = {"prompt": "1", "chosen": "2", "rejected": "3"}
    files = {
        "weighted_pairs": row | {"chosen_weights": 1.0, "rejected_weights": 0.5},
        "lists": {"prompt": "1", "completions": ["2", "3"], "scores": [1.0, 0.0]},
        "delta_pairs": row,
    }
    for name, content in files.items():
        (tmp_path / "runs" / f"{name}.jsonl").write_text((json.dumps(content) + "\n") * 100)
    return tmp_path


@pytest.mark.parametrize("name", HUB)
def test_every_hub_recipe_passes_its_dry_run(equipped, name):
    before = sorted(equipped.rglob("*"))
    header = find_recipe(name).read_text().partition("accelerate_configs/")[2].partition(".yaml")[0]
    plan = planned(name, "--accelerate_config", header)
    assert plan.launch.processes == 8 and plan.launch.strategy == ("FSDP2" if header == "fsdp2" else "DDP")
    assert list(plan.estimates) == ["DDP", "ZeRO-2", "ZeRO-3", "FSDP2"]
    peaks = [found.peak for found in plan.estimates.values()]
    # Each shards more than the one before, and an adapter has little to shard; recipes are for GPUs of 80 GB.
    assert (
        peaks[1] > peaks[2]
        and (plan.recipe.peft is not None or peaks[0] > peaks[1])
        and peaks[["DDP", "FSDP2"].index(plan.launch.strategy) * 3] < 80e9
    )
    assert all(found.peak > found.weights + found.optimizer for found in plan.estimates.values())
    assert Path(plan.shapes).parent == RECIPES / "configs"
    assert sorted(equipped.rglob("*")) == before


@pytest.mark.parametrize("name", ["quickstart", "preference/sparse_po_tiny"])
def test_a_playground_is_planned_without_being_built(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    plan = planned(name)
    assert plan.weights.all - plan.weights.trained * (plan.recipe.peft is not None) == 132_800
    assert list(plan.estimates) == ["DDP"] and not list(tmp_path.iterdir())


def test_the_command_prints_the_plan_and_writes_nothing(tmp_path, playground, capsys):
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", max_steps=-1, num_train_epochs=2))
    assert hf_delta.train.main([str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    rows = len((playground / "sft.jsonl").read_text().splitlines())
    assert "132,800 parameters" in said and "64 rows" in said and "peak" in said and rows > 64
    # 64 rows, 4 at a time, twice.
    assert " 32, 2 epochs" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_words_of_a_plan(equipped):
    said = described(planned("rl/delta_l", "--accelerate_config", "ddp"))
    assert said["step"].startswith("512 rollouts of 64 prompts (8 x 8 x 8); at most 1,835,008 tokens, 3,584 each")
    assert said["rollouts"].endswith("500 times; vLLM takes 30% of each GPU")
    assert "10 checkpoints of 19.2 GiB" in said["saved"]
    assert size(1024) == "1 KiB" and size(3 * 2**30) == "3 GiB" and size(812 * 2**20) == "812 MiB" and size(0) == "0 B"


# -- what cannot work -----------------------------------------------------------------------------------------------
def test_batches_divide_for_the_processes_that_are_planned(tmp_path, playground):
    content = keys("grpo", playground, tmp_path / "out", per_device_train_batch_size=2)
    said = refusal(tmp_path, content, "--num_processes", "1")
    assert "generation_batch_size (2) must be divisible by num_generations (4)" in said
    assert plan_of(tmp_path, content, "--num_processes", "2").batches.prompts_per_generation == 1


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "lora", "target_modules": ["q_proj", "query"]}, "there is no layer 'query' in the model. Its linear layers are down_proj,"),
        ({"method": "lora", "target_modules": r".*\.query"}, "no layer has a name like '.*\\\\.query'"),
        ({"method": "lora", "target_modules": ["input_layernorm"]}, "peft_config: Target module Qwen3RMSNorm"),
        ({"method": "pmss", "target_modules": ["input_layernorm"]}, "peft_config: "),
        ({"method": "pmss", "r": 65, "target_modules": ["q_proj"]}, "r is 65, and a 64x64 weight has no 65 rows"),
        ({"method": "edora", "r": 65, "target_modules": ["q_proj"]}, "peft_config: "),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_the_model(tmp_path, playground, adapter, said):
    assert said in refusal(tmp_path, keys("sft", playground, tmp_path / "out", peft_config=adapter))


@pytest.mark.parametrize(
    ("trainer", "changes", "flags", "said"),
    [
        ("sft", {"train_file": "nowhere.jsonl"}, [], "train_file: nowhere.jsonl does not exist"),
        ("grpo", {"use_vllm": True}, [], "vllm is not installed"),
        ("sft", {"model_name_or_path": "no/such-model"}, [], "no--such-model.json, as in its config.json"),
        ("sft", {"use_cpu": False}, ["--accelerate_config", "zero3"], "zero3.yaml: deepspeed is not installed"),
        ("sft", {}, ["--accelerate_config", "fsdp2"], "FSDP2 is for GPUs, and the recipe says use_cpu: true"),
        ("grpo", {"evaluate_pass_at": [1]}, ["--accelerate_config", "fsdp2"], "evaluate_pass_at needs the whole model"),
        ("sft", {}, ["--accelerate_config", "fsdp"], "accelerate_config: fsdp is no file and none of cpu, ddp, fsdp2"),
        ("sft", {}, ["--num_processes", "0"], "num_processes must be at least 1, got 0"),
        ("grpo", {"max_train_rows": 3, "per_device_train_batch_size": 16}, [], "the data has 3 rows, and a generation batch takes 4"),
        (
            "dpo",
            {"loss_type": "tis_dpo", "token_weights_kwargs": {"positive": "nowhere", "negative": "nowhere"}},
            [],
            "nowhere is no directory. Train that model first",
        ),
    ],
)  # fmt: skip
def test_what_else_cannot_work(tmp_path, playground, monkeypatch, trainer, changes, flags, said):
    absent = ("vllm", "deepspeed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else FIND_SPEC(name, *a))
    content = keys(trainer, playground, tmp_path / "out", **changes)
    assert said in refusal(tmp_path, content, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_exported_lora_must_fit_vllm(tmp_path, playground):
    lora = {"method": "lora", "r": 513, "target_modules": ["gate_proj"]}
    content = keys("sft", playground, tmp_path / "out", peft_config=lora)
    # Trained it can be, and merged.
    assert plan_of(tmp_path, content).lora_rank is None
    content |= {"push_to_hub": True, "push_lora": True, "hub_model_id": "me/mine", "base_model_id": "me/base"}
    assert "push_lora: rank 513 is above 512, the largest that vLLM takes" in refusal(tmp_path, content)
    content["peft_config"] = {**lora, "r": 257}
    assert plan_of(tmp_path, content).lora_rank == 320


def test_a_launch_is_planned_by_a_dry_run_only(tmp_path, playground):
    with pytest.raises(InputError, match="num_processes goes with dry_run alone"):
        load_recipe(str(write(tmp_path, keys("sft", playground, tmp_path / "out"))), ["--num_processes", "2"])


# -- launches -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "processes", "strategy"),
    [("single", 1, "DDP"), ("cpu", 2, "DDP"), ("ddp", 8, "DDP"), ("fsdp2", 8, "FSDP2"), ("zero2", 8, "ZeRO-2"), ("zero3", 8, "ZeRO-3")],
)  # fmt: skip
def test_configurations_of_accelerate(name, processes, strategy):
    found = read_launch(f"accelerate_configs/{name}.yaml")
    assert (found.processes, found.strategy) == (processes, strategy)


@pytest.mark.parametrize("text", ["a: [", "distributed_type: TPU", "distributed_type: NO\nnum_processes: many", "[]"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="launch.yaml"):
        read_launch(str(path))


# -- memory ---------------------------------------------------------------------------------------------------------
def whole(parameters, trained=None, layers=10, width=2):
    """A model of which all is trained, without embeddings to speak of."""
    trained = parameters if trained is None else trained
    return Weights(
        all=parameters,
        trained=trained,
        frozen_bytes=width * (parameters - trained),
        trained_bytes=width * trained,
        frozen_values=parameters - trained,
        layers=layers,
        layer_values=parameters // layers,
        root_values=0,
        embedding_values=0,
        largest_trained=parameters // 100,
        embedding_trained=False,
        head_trained=False,
        tied=False,
    )


NO_HEAD = Head(tokens=0, vocabulary=0, width=0, compute=2, weight=2, hidden=2, trained=False, fused=True)
NOTHING = Activations(0, 0, 0, 0)


def test_states_of_7_5_billion_parameters_on_64_gpus_as_in_the_paper_of_zero():
    """arXiv:1910.02054, figure 1: 16.6 GB with states and gradients sharded, 1.9 GB with weights sharded too."""
    weights = whole(7_500_000_000, layers=1000, width=4)
    step = Step(weights, NOTHING, NO_HEAD, "adamw_torch", accumulates=True, tokens=1, autocast=True)
    two, three = (estimate(step, name, 64) for name in ("ZeRO-2", "ZeRO-3"))
    bucket = 2 * 500_000_000
    assert (two.weights + two.gradients + two.optimizer - bucket) / 1e9 == pytest.approx(16.6, abs=0.05)
    gathered = 2 * 2 * weights.layer_values
    assert (three.weights + three.gradients + three.optimizer - bucket - gathered) / 1e9 == pytest.approx(
        1.9, abs=0.05
    )


def test_peaks_by_hand():
    weights, acts = whole(1000, trained=200, width=4), Activations(base=7, saved=30, forward=11, backward=50)
    step = Step(weights, acts, NO_HEAD, "adamw_torch_fused", accumulates=False, tokens=1)
    found = estimate(step)
    # Weights, two states, and all gradients, which are more than what ten layers keep and the last one's own.
    assert (found.peak, found.moment) == (
        4000 + 1600 + 7 + 300 + 50,
        "end of backward",
    ) or found.moment == "end of backward"
    assert found.peak == 4000 + 1600 + max(7 + 300 + 50, 800 + 7)
    many = Activations(base=7, saved=300, forward=11, backward=50)
    step = Step(weights, many, NO_HEAD, "sgd", accumulates=True, tokens=1)
    assert estimate(step).peak == 4000 + 800 + 7 + 3000 + 50
    rollouts = Rollouts(sequences=5, tokens=20, prompt=4, kv_values=8, width=2, vocabulary=100, merged_bytes=3)
    step = Step(weights, NOTHING, NO_HEAD, "sgd", accumulates=False, tokens=1, rollouts=rollouts)
    # Keys and values of ten layers and of one more, and five copies of the logits.
    assert (
        estimate(step).peak == 4000 + 5 * 20 * 8 * 2 * 11 + 5 * 4 * 5 * 100 + 3 and estimate(step).moment == "rollouts"
    )


@pytest.mark.parametrize(("name", "bytes_"), [("adamw_torch", 80), ("adamw_bnb_8bit", 20), ("sgd", 0), ("adafactor", 0), ("paged_adamw_8bit", 20), ("another", 80)])  # fmt: skip
def test_states_of_optimizers(name, bytes_):
    assert state_bytes(name, 10, 4.0) == bytes_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_what_trl_allocates(dtype):
    tokens, words, width = 96, 40_000, 24
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, dtype=dtype, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    with LiveBytes() as live:
        live.count([hidden, weight])
        before = live.now
        logps = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)[0]
        forward, start = live.peak - before, live.now
        live.peak = live.now
        logps.sum().backward()
        backward = live.peak - start
    head = Head(tokens, words, width, dtype.itemsize, dtype.itemsize, dtype.itemsize, trained=True, fused=False)
    assert head.forward == pytest.approx(forward, rel=0.05)
    assert head.backward == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [None, {"method": "lora", "r": 4}, {"method": "bone", "r": 16}, {"method": "pmss", "r": 8}],
)  # fmt: skip
def test_activations_are_those_of_a_real_pass(playground, settings, checkpointing):
    """One block without memory, times the layers, against all layers of the real model with real tensors."""
    config = AutoConfig.from_pretrained(playground / "model")
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 5
    peft = None if settings is None else block(target_modules="all-linear", **settings)
    found, with_adapter = activations(config, peft, Pass(8, 40, torch.float32, checkpointing=checkpointing))
    assert with_adapter
    model = AutoModelForCausalLM.from_config(config)
    if peft is not None:
        model = get_peft_model(model, peft)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backbone = (model if peft is None else model.get_base_model()).base_model
    ids = torch.zeros(8, 40, dtype=torch.long)
    ids[0, 0] = 1
    mask = (torch.arange(40) >= ids).long()
    # What adapters derive once from the weights.
    backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as live:
        live.count([*model.parameters(), *model.buffers()])
        before = live.now
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        kept, forward = live.now - before, live.peak - before
        live.peak = live.now
        hidden.backward(torch.ones_like(hidden))
        backward = live.peak - before
    assert found.base + 5 * found.saved == pytest.approx(kept, rel=0.05)
    # What comes after the blocks is taken to be there already in the last of them.
    assert 0.95 * forward < found.base + 5 * found.saved + found.forward < 1.25 * forward
    assert found.base + 5 * found.saved + found.backward == pytest.approx(backward, rel=0.05)


# -- rows and steps -------------------------------------------------------------------------------------------------
def test_lengths_are_those_of_the_rows(playground):
    from datasets import Dataset

    tokenizer = local_tokenizer(str(playground / "model"), None)
    rows = Dataset.from_list(
        [{"prompt": "1+1:", "chosen": "2", "rejected": "23"}, {"prompt": "12+1:", "chosen": "1", "rejected": "2"}]
    )
    # Every character is a token, and an answer has one more for its end.
    assert measure(rows, tokenizer) == Lengths(prompt=5, sequence=7, answers=2)
    listed = Dataset.from_list([{"prompt": "1+1:", "completions": ["2", "345", "1"]}])
    assert measure(listed, tokenizer) == Lengths(prompt=4, sequence=8, answers=3)
    assert measure(Dataset.from_list([{"prompt": "1+1:", "answer": "2"}]), tokenizer) == Lengths(4, 4, 1)
    assert local_tokenizer("no/such-model", None) is None


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 100])
@pytest.mark.parametrize("processes", [1, 3])
def test_steps_of_an_epoch_are_those_of_the_samplers(rows, processes):
    sampler = BatchSampler(SequentialSampler(range(rows)), 4, drop_last=False)
    micro = len(BatchSamplerShard(sampler, processes, 0))
    found = pair_batches(rows, 4, processes, 2, -1, 3, drop_last=False)
    assert found.steps == 3 * -(-micro // 2) and found.epochs == 3
    if rows >= 6:
        # 24 rollouts of 6 prompts at a time, in two micro-batches for each process, each generation used twice.
        batch = 12 // processes
        repeated = len(RepeatSampler(range(rows), 4, 6, repeat_count=2 * 2))
        micro = repeated // (batch * 2 * processes) * 1
        found = rollout_batches(rows, batch, processes, 4, -1, 1, generations=4, generation_batch=24, steps_per_generation=2, iterations=2)  # fmt: skip
        assert found.steps == -(-micro // 4) and found.generations == found.steps


def test_steps_and_checkpoints_that_are_given():
    assert pair_batches(None, 4, 8, 2, -1, 1, drop_last=False).steps is None
    assert pair_batches(None, 4, 8, 2, 30, 1, drop_last=False).steps == 30
    assert checkpoints(500, "steps", 50, None, None) == 10
    assert checkpoints(510, "steps", 50, None, None) == 11
    assert checkpoints(510, "steps", 0.1, None, 3) == 3
    assert checkpoints(None, "steps", 50, 1.0, None) is None
    assert checkpoints(100, "epoch", 50, 2.5, None) == 3 and checkpoints(100, "no", 50, 1, None) == 0
