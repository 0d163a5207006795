"""Weights with adapters in them, one module at a time: values, names and order, and that the model stays as it is."""

import copy
import weakref
from contextlib import nullcontext

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_delta._compat.bitsandbytes import dequantised_weight
from hf_delta._compat.twins import twin
from hf_delta.adapters.dora import fast_dora
from hf_delta.adapters.stream import merged_weights
from hf_delta.errors import InputError
from tests.adapters.life import DORA, KINDS, adapted, base_model, config_of, gpt2_model, logits, perturb
from tests.rl.merged import LORA, METHODS, everything_stays, model_of, move, tuner_layers


FAST_DORA = "fast_dora"
TIED_HEAD = "head_trained"
ALL = [*(kind for kind in METHODS if kind != TIED_HEAD), *KINDS, *DORA, FAST_DORA]


def streamed(model):
    """What comes, while the model and its buffers stay as they are."""
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with everything_stays(model):
        found = [(name, tensor.clone()) for name, tensor in merged_weights(model)]
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1]), name
    return found


def assert_merged(model):
    """Names and order of the base model, and the bits of a copy merged for good."""
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    found = streamed(model)
    assert [name for name, _ in found] == list(expected)
    for name, tensor in found:
        assert type(tensor) is torch.Tensor and not tensor.requires_grad and tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "16"])
@pytest.mark.parametrize("kind", ALL)
def test_bits_are_those_of_a_merged_copy(kind, dtype):
    with fast_dora() if kind == FAST_DORA else nullcontext():
        model = model_of("dora" if kind == FAST_DORA else kind, dtype)
        before = dict(base_model(dtype).named_parameters())
        found = assert_merged(model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found)


def test_the_engine_of_those_weights_is_the_model():
    model = model_of("edora")
    engine = base_model()
    engine.load_state_dict(dict(merged_weights(model)), strict=False)
    assert torch.allclose(logits(engine), logits(model), atol=1e-5)
    assert not torch.allclose(logits(engine), logits(base_model()), atol=1e-3)


# -- which weights -------------------------------------------------------------------------------------------------------
def untied_model():
    model = base_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.3)
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["embed_tokens"]], ids="-".join)
@pytest.mark.parametrize("whole", [[], ["lm_head"], ["embed_tokens", "norm"]], ids="-".join)
def test_embeddings_heads_and_modules_that_are_trained_whole(targets, whole):
    if set(targets) & set(whole):
        return
    model = move(get_peft_model(untied_model(), LoraConfig(r=4, target_modules=targets, modules_to_save=whole)))
    assert_merged(model)


def test_the_active_adapter_and_its_own_copy_of_a_module():
    model = move(get_peft_model(untied_model(), LoraConfig(**LORA, modules_to_save=["lm_head"])))
    model.add_adapter("other", LoraConfig(**{**LORA, "target_modules": ["v_proj"]}, modules_to_save=["lm_head"]))
    model.set_adapter("other")
    other = assert_merged(move(model, seed=7))
    model.set_adapter("default")
    default = assert_merged(model)
    differing = {name for (name, one), (_, two) in zip(default, other) if not torch.equal(one, two)}
    layers = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}  # fmt: skip
    assert differing == {*layers, "lm_head.weight"}


@pytest.mark.parametrize("kind", ["lora", "bat_row", "pmss"])
def test_several_active_adapters_that_add_up(kind):
    model = model_of(kind)
    model.add_adapter("other", LoraConfig(**LORA) if kind == "lora" else config_of(kind))
    perturb(model, seed=5, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    assert_merged(model)


@pytest.mark.parametrize("kind", ["lora", "bone"])
def test_what_is_merged_or_disabled_already(kind):
    model = model_of(kind)
    base = dict(base_model().named_parameters())
    with model.disable_adapter():
        assert all(torch.equal(tensor, base[name]) for name, tensor in streamed(model))
    merged = dict(streamed(model))
    model.merge_adapter()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in streamed(model))


def test_adapters_that_transformers_has_put_in():
    model = base_model()
    model.add_adapter(LoraConfig(**LORA))
    perturb(model)
    found = dict(streamed(model))
    assert list(found) == [name for name, _ in base_model().named_parameters()]
    layer = tuner_layers(model)[0]
    expected = layer.get_base_layer().weight + layer.get_delta_weight("default")
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], expected)


def test_conv1d():
    model = get_peft_model(gpt2_model(), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    assert_merged(move(model))


def test_experts_in_one_tensor():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8}
    config = Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=2, vocab_size=24)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)
    assert_merged(move(get_peft_model(Qwen3MoeForCausalLM(config), lora)))


def test_activation_checkpointing_of_torch_leaves_no_trace_in_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = model_of("lora")
    names = [name for name, _ in merged_weights(model)]
    blocks = model.get_base_model().model.layers
    blocks[0] = checkpoint_wrapper(blocks[0])
    assert [name for name, _ in merged_weights(model)] == names


# -- quantised and sharded -----------------------------------------------------------------------------------------------
QUANTISED = ["lora", "rslora", "peft_dora", "dora", "miss", "ia3", "oft", "vera", "bone", "bat_row", "pmss", "edora"]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_come_dense_with_the_change_in_full(kind, bits, tmp_path):
    """Not through another quantisation, as PEFT merges: what the adapter was trained on, and what it adds."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=24, pad_token_id=0)).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**{f"load_in_{bits}": True})
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    modules = dict(dense.named_modules())
    with torch.no_grad():
        for name, module in base.named_modules():
            if "bit" in type(module).__name__:
                modules[name].weight.copy_(dequantised_weight(module))
    if kind in KINDS | DORA:
        config = config_of(kind)
    else:
        cls, fields = METHODS[kind]
        config = cls(**{"target_modules": LORA["target_modules"], "task_type": "CAUSAL_LM", **fields})
    with fast_dora() if kind == "dora" else nullcontext():
        torch.manual_seed(1)
        model = move(get_peft_model(base, config))
        torch.manual_seed(1)
        whole = get_peft_model(dense, config)
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
                if name in held and held[name].is_floating_point():
                    tensor.copy_(held[name])
        expected = dict(whole.merge_and_unload().named_parameters())
        found = dict(streamed(model))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype.is_floating_point and tensor.shape == expected[name].shape
        # 8 bits are dequantised to 16.
        tolerance = 1e-6 if tensor.dtype == torch.float32 else 2e-3
        torch.testing.assert_close(tensor.float(), expected[name], rtol=tolerance, atol=tolerance)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["lora", "peft_dora", "miss", "bone", "oft"])
def test_shards_are_gathered_and_stay_shards_also_after_a_forward(kind, one_process):
    model = model_of(kind)
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    for _ in range(2):
        found = dict(merged_weights(model))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert not isinstance(tensor, DTensor) and torch.equal(tensor, expected[name]), name
        logits(model)
    blocks = [parameter for name, parameter in model.named_parameters() if ".layers." in name]
    assert blocks and all(isinstance(parameter, DTensor) for parameter in blocks)


def test_hooks_of_the_model_do_not_run_on_what_is_merged_beside_it(one_process):
    model = model_of("bone")
    for layer in tuner_layers(model):
        # As FSDP has them: into shards, of a module that it knows nothing of.
        layer.get_base_layer().register_state_dict_pre_hook(lambda *args: pytest.fail("a hook ran"))
    with pytest.raises(pytest.fail.Exception):
        copy.deepcopy(model).merge_adapter()
    assert len(list(merged_weights(model))) == len(list(base_model().parameters()))


# -- memory --------------------------------------------------------------------------------------------------------------
class Bytes(TorchDispatchMode):
    """Counts the memory of what operations make, while it lives."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage):
        key = storage.data_ptr()
        if key and key not in self.known:
            self.known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("kind", ["lora", "peft_dora", FAST_DORA, "miss", "bone", "pmss", "edora", "oft"])
def test_no_more_than_one_block_is_in_memory_beside_the_model(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=24, pad_token_id=0))
    with fast_dora() if kind == FAST_DORA else nullcontext():
        if kind in KINDS:
            model = adapted(kind, base)
        else:
            cls, fields = METHODS["peft_dora" if kind == FAST_DORA else kind]
            model = move(get_peft_model(base, cls(**{"target_modules": "all-linear", **fields})))
        layer = model.get_base_model().model.layers[0]
        block = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
        known = Bytes()
        known.known |= {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        total = 0
        with known:
            for _, tensor in merged_weights(model):
                total += tensor.nbytes
                del tensor
    assert total > 5 * block
    assert 0 < known.peak <= block
    assert known.live < block / 100


# -- what cannot be streamed ---------------------------------------------------------------------------------------------
def lora(**changes):
    return move(get_peft_model(base_model(), LoraConfig(**LORA | changes)))


def with_parameter(change):
    model = lora()
    base = tuner_layers(model)[0].get_base_layer()
    base.weight = change(base.weight)
    return model


def several_methods():
    model = peft.PeftMixedModel(base_model(), LoraConfig(**LORA))
    model.add_adapter("other", peft.LoHaConfig(target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    return model


def two_active():
    model = model_of("miss")
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    return model


REFUSED = {
    "one weight in the base model": lambda: lora(target_modules=["lm_head"]),
    "model.embed_tokens.weight and lm_head.weight": lambda: model_of(TIED_HEAD),
    "offloaded": lambda: lora().to("meta"),
    "float8_e4m3fn": lambda: with_parameter(lambda w: nn.Parameter(w.detach().to(torch.float8_e4m3fn), requires_grad=False)),
    "2 active adapters": two_active,
    "several methods": several_methods,
    "not supported for Lily": lambda: get_peft_model(base_model(), peft.LilyConfig(r=4, target_modules=["q_proj"])),
    "aLoRA does not support merging": lambda: lora(alora_invocation_tokens=[1, 4]),
    "base layer has no bias": lambda: lora(lora_bias=True),
    "PREFIX_TUNING": lambda: get_peft_model(
        base_model(), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    model = REFUSED[reason]()
    with pytest.raises(InputError, match=reason):
        list(merged_weights(model))
    assert not any(layer.merged for layer in tuner_layers(model))


def test_fsdp1_is_refused(one_process):
    model = lora()
    FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="FSDP 1"):
        list(merged_weights(model))


@pytest.mark.parametrize(("kind", "value"), [("lora", float("nan")), ("pmss", float("inf")), ("miss", float("inf"))])
def test_values_that_are_not_finite(kind, value):
    model = model_of(kind)
    with torch.no_grad():
        [p for p in model.parameters() if p.requires_grad][-1].view(-1)[0] = value
    with pytest.raises(InputError, match=r"layers\.1.*NaN or infinite values"):
        list(merged_weights(model))


def test_memory_that_is_not_there():
    model = model_of("lora")
    layer = tuner_layers(model)[2]

    def fail(*args):
        raise torch.OutOfMemoryError

    layer.get_delta_weight = fail
    with everything_stays(model), pytest.raises(torch.OutOfMemoryError):
        list(merged_weights(model))


def test_a_layer_that_merges_without_a_word_and_without_effect(monkeypatch):
    model = model_of("lora", torch.float32)
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "merge", lambda self, *args, **kwargs: None)
    with pytest.raises(InputError, match=r"\(lora Linear\) does not merge"):
        list(merged_weights(model))


def test_a_twin_ties_what_is_tied_and_computes_as_its_class_does():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight, model[0].forward = model[0].weight, lambda x: x
    asked = []
    copied = twin(model, lambda p: asked.append(p) or nn.Parameter(p.detach().clone()))
    assert len(asked) == len({id(p) for p in asked}) == 3
    assert copied[0].weight is copied[1].weight is not model[0].weight
    x = torch.ones(1, 3)
    assert torch.equal(copied[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
