"""Memory of a plan, against real tensors, the ZeRO paper, and sums by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels import ChunkedLogProbFunction

from hf_delta._compat.live import LiveBytes
from hf_delta.adapters.dora import fast_dora
from hf_delta.plan.held import held, saved_states, state_bytes
from hf_delta.plan.memory import estimate
from hf_delta.plan.parts import Activations, Head, Rollouts, Step, Weights
from hf_delta.plan.trace import Pass, activations
from tests.plan.test_shapes import block


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
    # DeepSpeed's bucket, and what ZeRO-3 keeps for the way back: half of the values that it looks ahead, and a block.
    bucket, gathered = 2 * 500_000_000, 2 * (500_000_000 + weights.layer_values)
    assert (two.weights + two.gradients + two.optimizer - bucket) / 1e9 == pytest.approx(16.6, abs=0.05)
    assert (three.weights + three.gradients + three.optimizer - bucket - gathered) / 1e9 == pytest.approx(
        1.9, abs=0.05
    )


def test_peaks_by_hand():
    weights, acts = whole(1000, trained=200, width=4), Activations(base=7, saved=30, forward=11, backward=50)
    step = Step(weights, acts, NO_HEAD, "adamw_torch_fused", accumulates=False, tokens=1)
    found = estimate(step)
    # Weights, two states, and all gradients, which are more than what ten layers keep and the last one's own.
    assert (found.peak, found.moment) == (4000 + 1600 + 800 + 7, "end of backward")
    many = Activations(base=7, saved=300, forward=11, backward=50)
    step = Step(weights, many, NO_HEAD, "sgd", accumulates=True, tokens=1)
    assert estimate(step).peak == 4000 + 800 + 7 + 3000 + 50
    rollouts = Rollouts(sequences=5, tokens=20, prompt=4, kv_values=8, width=2, vocabulary=100, merged_bytes=3)
    step = Step(weights, NOTHING, NO_HEAD, "sgd", accumulates=False, tokens=1, rollouts=rollouts)
    # Keys and values of ten layers and of one more, and five copies of the logits.
    assert (
        estimate(step).peak == 4000 + 5 * 20 * 8 * 2 * 11 + 5 * 4 * 5 * 100 + 3 and estimate(step).moment == "rollouts"
    )


# Bytes of the states of ten values in float32.
STATES = {
    "adamw_torch": 80,
    "adamw_torch_fused": 80,
    "adamw_torch_8bit": 20,
    "adamw_torch_4bit": 10,
    "adamw_bnb_8bit": 20,
    "paged_adamw_8bit": 20,
    "paged_adamw_32bit": 80,
    "ademamix": 120,
    "ademamix_8bit": 30,
    "paged_ademamix_32bit": 120,
    "paged_ademamix_8bit": 30,
    "lion_32bit": 40,
    "lion_8bit": 10,
    "paged_lion_32bit": 40,
    "paged_lion_8bit": 10,
    "adafactor": 0,
    "sgd": 0,
    "adagrad": 40,
    "rmsprop": 40,
    "rmsprop_bnb_8bit": 10,
    "another": 80,
}


@pytest.mark.parametrize(("name", "bytes_"), STATES.items())
def test_states_of_optimizers(name, bytes_):
    assert state_bytes(name, 10, 4.0) == bytes_


@pytest.mark.parametrize("shape", [(48, 40_000, 24), (64, 1024, 2048)], ids=["many words", "wide"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("dtype", "computes"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["float32", "bfloat16", "autocast"],
)
def test_the_head_is_what_trl_allocates(shape, dtype, computes, trained, entropy):
    tokens, words, width = shape
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, dtype=dtype, requires_grad=trained)
    targets = torch.zeros(tokens, dtype=torch.long)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    with LiveBytes() as live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=computes != dtype):
        live.count([hidden, weight])
        before = live.now
        found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)
        forward, start = live.peak - before, live.now
        live.peak = live.now
        (found[0].sum() + found[1].sum() if entropy else found[0].sum()).backward()
        backward = live.peak - start
    head = Head(tokens, words, width, computes.itemsize, dtype.itemsize, dtype.itemsize, trained, False, entropy)
    assert head.forward + head.reserved == pytest.approx(forward, rel=0.02)
    assert head.backward + head.reserved == pytest.approx(backward, rel=0.02)


def test_pages_of_a_tile_that_are_never_written():
    head = Head(tokens=10, vocabulary=21, width=8, compute=4, weight=4, hidden=4, trained=False, fused=False)
    # A page of each row of 32768 words is written.
    assert head.reserved == 10 * (32768 * 4 - 4096)
    assert replace(head, fused=True).reserved == 0 == replace(head, vocabulary=40_000).reserved


ADAPTERS = [
    None,
    {"method": "lora", "r": 4},
    {"method": "bone", "r": 16},
    {"method": "pmss", "r": 8},
    {"method": "edora", "r": 32},
    {"method": "dora", "r": 8},
]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def passes(config, peft, checkpointing, autocast):
    """Bytes that a real model keeps for its backward pass, and the most of each pass, once adapters have what they derive."""
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
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(40) >= ids).long(), "use_cache": False}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def forward_pass():
        # As a trainer does: the backward pass is outside, when autocast has let go of its copies of weights.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return backbone(**inputs)[0]

    with LiveBytes() as live:
        live.count([*model.parameters(), *model.buffers()])
        before = live.now
        forward_pass()
        live.peak = live.now
        hidden = forward_pass()
        kept, forward = live.now - before, live.peak - before
        live.peak = live.now
        hidden.backward(torch.ones_like(hidden))
        return kept, forward, live.peak - before


def compare(config, settings, checkpointing, autocast):
    """One block without memory, times the layers, against all layers of the real model with real tensors."""
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 5
    peft = None if settings is None else block(target_modules="all-linear", **settings)
    dtype = torch.bfloat16 if autocast else None
    with fast_dora() if settings and settings["method"] == "dora" else nullcontext():
        seen = Pass(8, 40, torch.float32, autocast=dtype, checkpointing=checkpointing, fast_dora=True)
        found, with_adapter = activations(config, peft, seen)
        kept, forward, backward = passes(config, peft, checkpointing, autocast)
    assert with_adapter
    waiting = found.base + 5 * (found.saved + found.derived)
    assert waiting == pytest.approx(kept, rel=0.04)
    # What comes after the blocks is taken to be there already in the last of them.
    assert 0.96 * forward < waiting + found.forward + 4 * found.casts < 1.25 * forward
    assert waiting + found.backward == pytest.approx(backward, rel=0.04)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda settings: settings["method"] if settings else "none")
def test_activations_are_those_of_a_real_pass(playground, settings, checkpointing):
    compare(AutoConfig.from_pretrained(playground / "model"), settings, checkpointing, autocast=False)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda settings: settings["method"] if settings else "none")
def test_activations_under_autocast(playground, settings, checkpointing):
    compare(AutoConfig.from_pretrained(playground / "model"), settings, checkpointing, autocast=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_of_experts(playground, autocast):
    config = AutoConfig.for_model("qwen3_moe", vocab_size=32, hidden_size=64, head_dim=16, num_attention_heads=4,
                                  num_key_value_heads=2, **EXPERTS)  # fmt: skip
    compare(config, {"method": "lora", "r": 4}, False, autocast)


# -- what one of several processes holds ----------------------------------------------------------------------------
def step_of(weights, *, autocast=True, optimizer="adamw_torch", reference=False, derived=0):
    acts = Activations(0, 0, 0, 0, derived)
    return Step(weights, acts, NO_HEAD, optimizer, accumulates=True, tokens=1, reference=reference, autocast=autocast)


# A billion parameters in bfloat16, ten million of them trained in float32, 20 blocks of 40 million.
ADAPTED = Weights(
    all=1_000_000_000,
    trained=10_000_000,
    frozen_bytes=1_980_000_000,
    trained_bytes=40_000_000,
    frozen_values=990_000_000,
    layers=20,
    layer_values=40_000_000,
    root_values=200_000_000,
    embedding_values=100_000_000,
    largest_trained=100_000,
    embedding_trained=False,
    head_trained=False,
    tied=False,
    buffer_bytes=7_000_000,
)


def test_ddp_by_hand():
    one, four = (held(step_of(ADAPTED), "DDP", processes) for processes in (1, 4))
    # Two states of float32 for each trained value.
    assert (one.weights, one.optimizer, one.gradients) == (
        1_980_000_000 + 40_000_000 + 7_000_000,
        80_000_000,
        40_000_000,
    )
    # Buckets are a copy of the gradients, however many processes there are.
    assert replace(four, gradients=0) == replace(one, gradients=0) and four.gradients == 80_000_000
    assert held(step_of(ADAPTED, reference=True), "DDP", 4).reference == 2_020_000_000
    assert held(step_of(ADAPTED, derived=1000), "DDP", 1).weights == one.weights + 20 * 1000


def test_zero_by_hand():
    two, three = (held(step_of(ADAPTED), name, 4) for name in ("ZeRO-2", "ZeRO-3"))
    # All values in bfloat16; of the trained ones float32 and two states, a quarter of them here.
    assert (two.weights, two.optimizer) == (2_000_000_000 + 7_000_000, 12 * 10_000_000 // 4)
    # A bucket of 5e8 values, whatever is trained.
    assert two.gradients == three.gradients == 2 * 10_000_000 // 4 + 2 * 500_000_000
    assert three.weights == 2_000_000_000 // 4 + 7_000_000 and three.optimizer == two.optimizer
    assert two.gathered == 0 and not two.lasting and three.lasting
    # What is needed again within 1e9 values of the way to the head and back, and the block that is at work.
    assert three.gathered == 2 * (500_000_000 + 40_000_000)
    # Where two blocks, embeddings and head are more than that, these.
    large = replace(ADAPTED, root_values=600_000_000, layer_values=20_000_000)
    assert held(step_of(large), "ZeRO-3", 4).gathered == 2 * (2 * 20_000_000 + 600_000_000)
    # Never more than there is.
    small = replace(ADAPTED, all=300_000_000, frozen_values=290_000_000, root_values=100_000_000)
    assert held(step_of(small), "ZeRO-3", 4).gathered == 2 * 300_000_000
    reference = held(step_of(ADAPTED, reference=True), "ZeRO-3", 4).reference
    assert reference == 2_000_000_000 // 4
    # Computing in float32 needs no copy beside the states.
    whole = held(step_of(ADAPTED, autocast=False), "ZeRO-2", 4)
    assert (whole.weights, whole.optimizer) == (4_000_000_000 + 7_000_000, 8 * 10_000_000 // 4)


def test_fsdp_by_hand():
    found = held(step_of(ADAPTED), "FSDP2", 4)
    assert found.weights == (1_980_000_000 + 40_000_000) // 4 + 7_000_000
    assert (found.optimizer, found.gradients) == (80_000_000 // 4, 40_000_000 // 4 + 2 * 40_000_000)
    assert found.gathered == 2 * (2 * 40_000_000 + 200_000_000)
    # Under mixed precision accelerate makes trained weights float32, and a reference stays as it was loaded.
    half = replace(ADAPTED, trained=1_000_000_000, frozen_values=0, frozen_bytes=0, trained_bytes=2_000_000_000)
    found = held(step_of(half, reference=True), "FSDP2", 4)
    assert (found.weights, found.optimizer) == (1_000_000_000 + 7_000_000, 2_000_000_000)
    assert found.reference == 2_000_000_000 // 4
    plain = held(step_of(half, autocast=False), "FSDP2", 4)
    assert (plain.weights, plain.optimizer) == (500_000_000 + 7_000_000, 1_000_000_000)


def test_quantised_weights_are_gathered_as_they_are():
    # 700 million values of the blocks in half a byte.
    packed = replace(ADAPTED, frozen_values=290_000_000, packed_bytes=350_000_000, root_values=100_000_000)
    of_blocks = (350_000_000 + 2 * 200_000_000) / 900_000_000
    assert held(step_of(packed), "ZeRO-3", 4).gathered == round(of_blocks * 540_000_000)
    assert held(step_of(packed), "FSDP2", 4).gathered == round(of_blocks * 80_000_000) + 2 * 100_000_000
    assert held(step_of(packed), "ZeRO-2", 4).weights == 350_000_000 + 2 * 300_000_000 + 7_000_000


def test_room_that_lasts_is_there_in_rollouts():
    rollouts = Rollouts(sequences=5, tokens=20, prompt=4, kv_values=8, width=2, vocabulary=10**9)
    step = replace(step_of(ADAPTED), rollouts=rollouts)
    two, three = (estimate(step, name, 4) for name in ("ZeRO-2", "ZeRO-3"))
    assert two.moment == three.moment == "rollouts"
    made = two.rollouts
    assert two.peak == two.weights + two.optimizer + made
    assert three.peak == three.weights + three.optimizer + made + three.gradients


def test_states_in_a_checkpoint():
    step = step_of(ADAPTED)
    assert saved_states(step, "DDP") == saved_states(step, "FSDP2") == 80_000_000
    # DeepSpeed saves the float32 weights too.
    assert saved_states(step, "ZeRO-2") == saved_states(step, "ZeRO-3") == 120_000_000


# -- moments --------------------------------------------------------------------------------------------------------
def test_gradients_of_the_head_wait_for_those_of_the_embeddings():
    acts = Activations(base=10, saved=100, forward=20, backward=200)
    head = Head(tokens=1, vocabulary=100, width=80, compute=4, weight=4, hidden=4, trained=True, fused=False)
    weights = replace(
        whole(20_000, width=4), embedding_values=8000, embedding_trained=True, head_trained=True, tied=True
    )
    step = Step(weights, acts, head, "sgd", accumulates=False, tokens=1)
    gradient = 4 * 8000
    always, waiting = 80_000, 10 + 10 * 100
    found = estimate(step)
    # All gradients, and that of the embeddings before it is added to the head's.
    assert (found.peak, found.moment) == (always + 80_000 + gradient + 10, "end of backward")
    # With all gradients there, the head makes its own once more.
    accumulating = estimate(replace(step, accumulates=True))
    sums = {
        "head": 80_000 + waiting + head.backward,
        "end of backward": 80_000 + 2 * gradient + 10,
        "backward": 80_000 + gradient + waiting + 200,
    }
    assert accumulating.peak == always + max(sums.values()) and sums[accumulating.moment] == max(sums.values())


def test_a_reference_is_computed_while_the_policy_waits():
    acts = Activations(base=10, saved=100, forward=5000, backward=200)
    step = Step(whole(1000, trained=100), acts, NO_HEAD, "sgd", accumulates=False, tokens=1)
    alone, found = estimate(step), estimate(replace(step, second_pass=True, reference=True, extra=70))
    assert alone.peak == 2000 + 10 + 1000 + 5000
    assert (found.peak, found.moment, found.reference) == (2 * 2000 + 10 + 1000 + 70 + 5000 + 10, "reference", 2000)


def test_a_head_of_its_own():
    acts = Activations(base=10, saved=100, forward=20, backward=100_000)
    head = Head(tokens=1, vocabulary=1000, width=8, compute=4, weight=4, hidden=4, trained=True, fused=False)
    weights = replace(whole(20_000, width=4), head_trained=True)
    step = Step(weights, acts, head, "sgd", accumulates=False, tokens=1)
    # Its gradient is there while the blocks have their backward pass.
    assert estimate(step).peak == 80_000 + 10 + 1000 + 100_000 + 4 * 8000
    # With all gradients there it is added to one of them.
    assert estimate(replace(step, accumulates=True)).peak == 80_000 + 80_000 + 10 + 1000 + 100_000


def test_room_that_lasts_is_there_in_forward_passes():
    step = replace(step_of(ADAPTED), accumulates=False, activations=Activations(0, 0, 10**9, 0))
    two, three = (estimate(step, name, 4) for name in ("ZeRO-2", "ZeRO-3"))
    assert two.peak == two.weights + two.optimizer + max(10**9, two.gradients)
    assert three.peak == three.weights + three.optimizer + 10**9 + three.gradients


def test_adafactor_computes_in_float32():
    step = Step(whole(1000), NOTHING, NO_HEAD, "adafactor", accumulates=False, tokens=1)
    # Three copies of the largest tensor, which is a hundredth of the model.
    assert estimate(step).peak == 2000 + 2000 + 3 * 4 * 10


def test_one_process_shards_nothing():
    step = step_of(ADAPTED)
    assert len({estimate(step, name, 1) for name in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")}) == 1
