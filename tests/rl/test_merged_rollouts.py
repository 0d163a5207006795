"""Merged rollouts: what is computed inside, and that everything is as before after them."""

import gc
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_delta.adapters.dora import fast_dora
from hf_delta.errors import InputError
from hf_delta.rl.merged import merged_rollouts
from tests.adapters.life import DORA, IDS, KINDS, base_model, config_of, gpt2_model, logits, perturb
from tests.rl.merged import LORA, METHODS, everything_stays, model_of, move, truly_merged, tuner_layers


ALL = [*METHODS, *KINDS, *DORA]


def assert_merged_inside(model, tolerance=1e-5, ids=IDS):
    """Logits inside are those outside, also afterwards; every layer is merged; nothing is left behind."""
    expected = logits(model, ids)
    with everything_stays(model):
        with merged_rollouts(model):
            assert all(layer.merged for layer in tuner_layers(model))
            found = logits(model, ids)
    assert torch.equal(logits(model, ids), expected)
    with model.disable_adapter():
        change = (logits(model, ids) - expected).abs().max()
    assert (found - expected).abs().max() < min(tolerance, change / 2)
    return found


@pytest.mark.parametrize("kind", ALL)
def test_logits_inside(kind):
    model = model_of(kind)
    found = assert_merged_inside(model)
    assert torch.equal(found, truly_merged(model))


def test_layers_in_training_mode_stay_in_it():
    model = model_of("lora", lora_dropout=0.5).train()
    expected = logits(model.eval())
    model.train()
    with everything_stays(model), merged_rollouts(model):
        # Dropout is on the way through the adapters, which nobody takes here.
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "peft_dora", "miss_bat", "bat_row", "pmss", "edora", "dora"])
def test_base_in_16_bits_is_bitwise_the_same_after_100_rollouts(kind):
    with fast_dora() if kind == "dora" else warnings.catch_warnings():
        model = model_of(kind, torch.bfloat16)
        base = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        }
        values = {name: parameter.clone() for name, parameter in base.items()}
        for rollout in range(100):
            perturb(model, seed=rollout, std=0.01)
            with merged_rollouts(model):
                if rollout % 50 == 0:
                    logits(model)
        now = dict(model.named_parameters(remove_duplicate=False))
        assert all(now[name] is base[name] and torch.equal(now[name], values[name]) for name in base)


def test_merging_and_unmerging_in_place_does_drift():
    """The control: what is avoided exists."""
    model = model_of("lora", torch.bfloat16)
    weight = tuner_layers(model)[0].get_base_layer().weight
    value = weight.clone()
    for rollout in range(20):
        perturb(model, seed=rollout, std=0.01)
        model.merge_adapter()
        model.unmerge_adapter()
    assert not torch.equal(weight, value)


@pytest.mark.parametrize("kind", ["lora", "peft_dora", "miss", "pmss", "bone", "dora"])
def test_a_decoded_token_calls_no_adapter(kind):
    model = model_of(kind)
    calls = []
    for layer in tuner_layers(model):
        for name, module in layer.named_modules():
            if name and not name.startswith("base_layer"):
                module.register_forward_hook(lambda *_: calls.append(1))
        if hasattr(layer, "delta_output"):
            layer.delta_output = layer.single_output = lambda *_: calls.append(1)
    with merged_rollouts(model):
        inside = model.generate(input_ids=IDS[:, :3], max_new_tokens=3, do_sample=False)
    assert not calls and inside.shape == (3, 6)
    if kind in ("lora", "peft_dora"):
        logits(model)
        assert calls


@pytest.mark.parametrize("kind", ["lora", "pmss", "dora"])
def test_optimizer_steps_the_same_objects_afterwards(kind):
    """Three steps with rollouts between them are three steps without; gradients and hooks are where they were."""

    def train(rollouts):
        with fast_dora() if kind == "dora" else warnings.catch_warnings():
            model = model_of(kind).train()
            trained = [p for p in model.parameters() if p.requires_grad]
            steps = []
            trained[0].register_post_accumulate_grad_hook(lambda _: steps.append(1))
            optimizer = torch.optim.AdamW(trained, lr=0.01)
            for _ in range(3):
                if rollouts:
                    with merged_rollouts(model):
                        model.generate(input_ids=IDS[:, :3], max_new_tokens=2, do_sample=False)
                model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert len(steps) == 3
            return torch.cat([p.detach().flatten() for p in trained])

    assert torch.equal(train(rollouts=True), train(rollouts=False))


def test_norms_of_fast_dora_are_not_those_of_the_merged_weight():
    with fast_dora():
        model = model_of("dora")
        logits(model)
        for seed in range(2):
            assert_merged_inside(perturb(model, seed))


@pytest.mark.parametrize("failing", ["clone", "merge"])
def test_memory_that_is_not_there(failing, monkeypatch):
    """In the middle of copying a layer's parameters, or of merging: an error, and all originals."""
    model = model_of("lora")
    last = tuner_layers(model)[2]

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError

    if failing == "merge":
        last.get_delta_weight = fail
    else:
        bias = last.get_base_layer().bias.data_ptr()
        clone = torch.Tensor.clone
        monkeypatch.setattr(torch.Tensor, "clone", lambda t, **k: fail() if t.data_ptr() == bias else clone(t, **k))
    before = [(id(p), p.data_ptr()) for p in model.parameters()]
    with pytest.raises(torch.OutOfMemoryError), merged_rollouts(model):
        pass
    assert before == [(id(p), p.data_ptr()) for p in model.parameters()]
    assert not any(layer.merged for layer in tuner_layers(model))


@pytest.mark.parametrize("kind", ["lora", "miss_bat", "bat_row", "dora", "layer_norm"])
def test_a_rollout_that_fails(kind):
    model = model_of(kind)
    with everything_stays(model), pytest.raises(KeyboardInterrupt):
        with merged_rollouts(model):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens", "q_proj"], ["lm_head", "embed_tokens"]], ids="-".join
)
def test_of_tied_weights_only_those_with_an_adapter_change(targets):
    model = move(get_peft_model(base_model(), LoraConfig(**LORA | {"target_modules": targets}))).eval()
    inner = model.get_base_model()
    head, embeddings = inner.lm_head, inner.model.embed_tokens
    tied = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in (head, embeddings)]
    assert tied[0].weight is tied[1].weight
    assert_merged_inside(model)
    assert tied[0].weight is tied[1].weight
    with merged_rollouts(model):
        assert tied[0].weight is not tied[1].weight


def test_conv1d_and_embeddings():
    for targets in (["c_attn", "c_fc"], ["c_attn", "wte"]):
        for use_dora in (False, True):
            config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, use_dora=use_dora)
            assert_merged_inside(move(get_peft_model(gpt2_model(), config)).eval())


def test_experts_in_one_tensor():
    """Two wrapped parameters of one module, one inside of the other; the rest of the module is not copied."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=24,
        head_dim=8,
    )
    for names in (["gate_up_proj"], ["gate_up_proj", "down_proj"]):
        targets = [f"mlp.experts.{name}" for name in names]
        lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)
        model = move(get_peft_model(Qwen3MoeForCausalLM(config), lora)).eval()
        assert_merged_inside(model)
        experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
        down = experts.down_proj
        with merged_rollouts(model):
            assert (experts.down_proj is down) == ("down_proj" not in names)


# -- several adapters, merged ones, disabled ones -----------------------------------------------------------------------
def test_the_active_adapter_is_merged_and_no_other():
    model = model_of("lora")
    model.add_adapter("other", LoraConfig(**LORA))
    perturb(model, seed=5, adapter="other")
    model.set_adapter("other")
    expected = logits(model)
    with merged_rollouts(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    model.set_adapter("default")
    assert not torch.allclose(logits(model), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "bat_row", "pmss"])
def test_several_active_adapters_that_add_up(kind):
    model = model_of(kind)
    model.add_adapter("other", LoraConfig(**LORA) if kind == "lora" else config_of(kind))
    perturb(model, seed=5, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    assert_merged_inside(model)


def test_disabled_adapters_stay_out():
    model = model_of("lora")
    with model.disable_adapter():
        expected = logits(model)
        with everything_stays(model), merged_rollouts(model):
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["lora", "bone"])
def test_what_was_merged_before_stays_merged(kind):
    model = model_of(kind)
    model.merge_adapter()
    expected = logits(model)
    with everything_stays(model), merged_rollouts(model):
        assert torch.equal(logits(model), expected)
    assert all(layer.merged for layer in tuner_layers(model))
    model.unmerge_adapter()
    assert_merged_inside(model)


def test_rollouts_inside_of_rollouts():
    model = model_of("lora")
    with everything_stays(model), merged_rollouts(model):
        expected = logits(model)
        with merged_rollouts(model):
            pass
        assert torch.equal(logits(model), expected)


def test_models_without_adapters_are_left_alone(caplog):
    model = base_model()
    with everything_stays(model), merged_rollouts(model):
        logits(model)
    assert not caplog.records


def test_adapters_that_transformers_has_put_in():
    model = base_model()
    model.add_adapter(LoraConfig(**LORA))
    perturb(model)
    expected = logits(model)
    with everything_stays(model), merged_rollouts(model):
        assert tuner_layers(model)[0].merged
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "value"), [("lora", float("nan")), ("pmss", float("inf")), ("miss", float("inf"))])
def test_values_that_are_not_finite(kind, value):
    model = model_of(kind)
    with torch.no_grad():
        [p for p in model.parameters() if p.requires_grad][-1].view(-1)[0] = value
    where = "layers.1.mlp.down_proj" if kind != "pmss" else "layers.1"
    state = [(id(p), p.data_ptr()) for p in model.parameters()]
    with pytest.raises(InputError, match=rf"{where}.*NaN or infinite values"), merged_rollouts(model):
        pass
    assert state == [(id(p), p.data_ptr()) for p in model.parameters()]
    assert not any(layer.merged for layer in tuner_layers(model))


# -- memory, and shared parameters --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["lora", "peft_dora", "bone", "dora"])
def test_extra_memory_is_one_copy_of_the_adapted_weights(kind):
    def parameters():
        gc.collect()
        return sum(each.nbytes for each in gc.get_objects() if type(each) is nn.Parameter)

    with fast_dora() if kind == "dora" else warnings.catch_warnings():
        model = model_of(kind)
        layers = tuner_layers(model)
        adapted_bytes = sum(p.nbytes for layer in layers for p in layer.get_base_layer().parameters())
        weights = sum(layer.get_base_layer().weight.nbytes for layer in layers)
        outside = parameters()
        with merged_rollouts(model):
            assert weights <= parameters() - outside <= adapted_bytes
        assert parameters() == outside


def test_linear_layers_that_share_a_parameter_are_merged_each_with_its_own_adapter():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).sin())

    model = move(get_peft_model(Shared(), LoraConfig(r=2, target_modules=["first", "second"])))
    x = torch.randn(3, 8)
    expected = model(x).detach()
    with everything_stays(model), merged_rollouts(model):
        assert torch.allclose(model(x), expected, atol=1e-6)
