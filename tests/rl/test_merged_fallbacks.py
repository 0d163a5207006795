"""Where merged rollouts are not possible: one warning says why, and the model computes what it did before."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_delta.adapters.dora import fast_dora
from hf_delta.rl.merged import merged_rollouts
from tests.adapters.life import adapted, base_model, config_of, logits, perturb
from tests.rl.merged import LORA, everything_stays, model_of, move, tuner_layers


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, so that sharded weights are whole shards."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_falls_back(model, reason, caplog, compute=logits):
    """The same output inside, nothing merged, and one warning for two rollouts."""
    expected = compute(model)
    caplog.clear()
    for _ in range(2):
        with merged_rollouts(model):
            assert not any(layer.merged for layer in tuner_layers(model))
            assert torch.equal(compute(model), expected)
    assert [r.levelname for r in caplog.records if r.name.startswith("hf_delta")] == ["WARNING"]
    assert "unmerged adapters" in caplog.text and reason in caplog.text


def lora(model=None, **changes):
    return move(get_peft_model(base_model() if model is None else model, LoraConfig(**LORA | changes))).eval()


# -- methods ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alora_invocation_tokens": [1, 4]}, "aLoRA does not support merging"),
        ({"lora_bias": True}, "base layer has no bias"),
    ],
)
def test_variants_of_lora(changes, reason, caplog):
    model = lora(**changes)
    with everything_stays(model):
        assert_falls_back(model, reason, caplog)


def test_a_method_without_merging(caplog):
    model = move(get_peft_model(base_model(), peft.LilyConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.eval()
    with everything_stays(model):
        assert_falls_back(model, "not supported for Lily", caplog)


def test_prompts_that_are_learnt(caplog):
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert_falls_back(get_peft_model(base_model(), config).eval(), "PREFIX_TUNING is no change of weights", caplog)


def test_prompts_inside_of_attention(caplog):
    config = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=24, pad_token_id=0))
    assert_falls_back(move(get_peft_model(base, config)).eval(), "ADAPTION_PROMPT is no change of weights", caplog)


def test_adapters_that_are_weighted_for_every_token(caplog):
    model = lora()
    model.peft_config["default"].peft_type = peft.PeftType.XLORA
    assert_falls_back(model, "XLORA", caplog)


@pytest.mark.parametrize("kind", ["peft_dora", "miss", "ia3"])
def test_several_active_adapters_that_may_not_add_up(kind, caplog):
    model = model_of(kind)
    model.add_adapter("other", model.peft_config["default"])
    move(model)
    model.base_model.set_adapter(["default", "other"])
    assert_falls_back(model, "2 active adapters", caplog)


def test_several_methods_in_one_layer(caplog):
    model = peft.PeftMixedModel(base_model(), LoraConfig(**LORA))
    model.add_adapter("other", peft.LoHaConfig(target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    assert_falls_back(move(model).eval(), "several methods", caplog)


def test_attention_of_torch(caplog):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = move(get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"]))).eval()
    x = torch.randn(3, 8)
    assert_falls_back(model, "inside of one another", caplog, compute=lambda model: model(x).detach())


# -- weights ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", ["lora", "dora", "bone"])
def test_quantised_bases(kind, bits, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=24, pad_token_id=0)).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}": True}), device_map="cpu"
    )
    config = LoraConfig(**LORA) if kind == "lora" else config_of(kind)
    model = perturb(get_peft_model(base, config)).eval()
    # PEFT's own DoRA loses the scales of 8-bit weights in its first forward.
    with fast_dora():
        logits(model)
        weights = [layer.get_base_layer().weight for layer in tuner_layers(model)]
        values = [weight.clone() for weight in weights]
        assert_falls_back(model, "quantised", caplog)
    for layer, weight, value in zip(tuner_layers(model), weights, values):
        assert layer.get_base_layer().weight is weight and torch.equal(weight, value)


def test_layers_that_keep_their_weight_in_buffers(caplog):
    """As GPTQ and AWQ do, and FSDP 1 in another way: there is no parameter that could be exchanged."""
    model = lora()
    base = tuner_layers(model)[0].get_base_layer()
    base.bias = None
    weight = base.weight
    del base.weight
    base.register_buffer("weight", weight.detach())
    assert_falls_back(model, "has a base layer without parameters (Linear)", caplog)


def test_8_bit_floats(caplog):
    model = lora()
    base = tuner_layers(model)[0].get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert_falls_back(model, "torch.float8_e4m3fn", caplog, compute=lambda model: base.weight.float())


def test_weights_that_are_elsewhere(caplog):
    model = lora().to("meta")
    assert_falls_back(model, "offloaded", caplog, compute=lambda _: torch.zeros(1))


def test_weights_that_deepspeed_has_partitioned(caplog):
    model = lora()
    tuner_layers(model)[-1].get_base_layer().weight.ds_id = 7
    with everything_stays(model):
        assert_falls_back(model, "down_proj is sharded", caplog)


@pytest.mark.parametrize("kind", ["lora", "bone"])
@pytest.mark.parametrize("blocks", [True, False])
def test_weights_that_fsdp2_has_sharded(kind, blocks, one_process, caplog):
    """The root's weights look whole after a forward: they are taken back into shards later."""
    model = lora() if kind == "lora" else adapted(kind).eval()
    for layer in model.get_base_model().model.layers if blocks else ():
        fully_shard(layer)
    fully_shard(model)
    assert_falls_back(model, "is sharded", caplog)


def test_one_sharded_weight_in_a_model_that_is_not(one_process, caplog):
    model = lora()
    fully_shard(tuner_layers(model)[0].get_base_layer())
    assert_falls_back(model, "is sharded", caplog)
    # With tensor parallelism, nothing but the tensor says so.
    model = lora()
    base = tuner_layers(model)[0].get_base_layer()
    base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), init_device_mesh("cpu", (1,))))
    assert_falls_back(model, "q_proj is sharded", caplog, compute=lambda _: torch.zeros(1))


def test_models_inside_of_fsdp1(one_process, caplog):
    model = lora()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert_falls_back(wrapped, "FSDP", caplog, compute=lambda _: torch.zeros(1))
    caplog.clear()
    # The root was unwrapped; what is inside has flat parameters.
    assert_falls_back(model, "is sharded", caplog, compute=lambda _: torch.zeros(1))
