"""Mask networks: open at the start, computed as written, and in no checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_delta.errors import InputError
from hf_delta.preference.weights import SparsePOWeights
from hf_delta.preference.weights.mask_nets import START_SPREAD, MaskNet, TokenMasks


WIDTH, LAYERS = 12, 3
KINDS = [(net, layers) for net in ("simple", "two_layer") for layers in ("all", "last")]


def network(net="simple", layers="all", sharing="independent", dropout=0.0, width=WIDTH, depth=LAYERS):
    return SparsePOWeights(net=net, layers=layers, sharing=sharing, dropout=dropout).network(width, depth)


def states(n=9, width=WIDTH, depth=LAYERS, seed=0):
    return torch.randn(n, depth, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("net, layers", KINDS)
@pytest.mark.parametrize("width, depth", [(1, 1), (8, 4), (64, 4), (96, 12)])
def test_no_mask_starts_at_zero(net, layers, width, depth):
    """For many seeds and scales, for hidden states with one huge feature, and for the worst ones that there are."""
    for seed in range(20):
        torch.manual_seed(seed)
        module = network(net, layers, width=width, depth=depth)
        hidden = states(64, width, depth, seed)
        spiked = hidden.clone()
        spiked[..., 0] += 1e3
        aligned = hidden.clone()
        if net == "simple":
            aligned = -module.reward.weight.detach().expand(4, -1, -1) * 1e4
            aligned = aligned.expand(-1, depth, -1)
        inputs = [scale * hidden for scale in (0.0, 1e-4, 1.0, 1e4)]
        inputs += [torch.nn.functional.layer_norm(hidden, (width,)), spiked, aligned, hidden.bfloat16()]
        for values in inputs:
            for masks in module(values):
                assert masks.min() >= 1 - START_SPREAD - 1e-4
                assert masks.max() <= 1 + START_SPREAD + 1e-4
                if values is hidden:
                    assert abs(float(masks.mean()) - 1) < 0.3


@pytest.mark.parametrize("net, layers", KINDS)
def test_no_mask_can_be_driven_to_zero_by_hidden_states(net, layers):
    torch.manual_seed(0)
    module = network(net, layers)
    hidden = states(16).requires_grad_()
    optimizer = torch.optim.Adam([hidden], lr=0.3)
    before = module(hidden)[0].mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        module(hidden)[0].sum().backward()
        optimizer.step()
    masks = module(hidden)[0]
    assert masks.mean() < before - 0.03 and masks.min() >= 1 - START_SPREAD - 1e-4


@pytest.mark.parametrize("net, layers", KINDS)
def test_masks_against_a_loop(net, layers):
    torch.manual_seed(3)
    module = network(net, layers).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    hidden = states().double()
    for part, masks in zip((module.reward, module.kl), module(hidden), strict=True):
        expected = []
        for token in hidden:
            heads = []
            for i, row in enumerate(token if layers == "all" else token[-1:]):
                row = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt() * part.norm_weight + part.norm_bias
                if net == "two_layer":
                    row = (part.hidden_weight[i] @ row + part.hidden_bias[i]).clamp(min=0)
                heads.append((part.weight[i] @ row + part.bias[i]).clamp(min=0))
            heads = torch.stack(heads)
            expected.append((part.mixer @ heads).clamp(min=0) if layers == "all" else heads[0])
        torch.testing.assert_close(masks, torch.stack(expected))
        assert masks.shape == (9,) and masks.dtype == torch.float64


@pytest.mark.parametrize("hidden", [0, 4])
@pytest.mark.parametrize("last", [False, True])
def test_gradients(hidden, last):
    torch.manual_seed(0)
    module = TokenMasks(5, 2, last=last, hidden=hidden, common=False).double()
    parameters = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def run(*values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), states(4, 5, 2).double())

    assert gradcheck(run, parameters)


def test_every_parameter_learns_from_the_first_step():
    module = network("two_layer", "all", "independent")
    sum(masks.square().sum() for masks in module(states())).backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def test_a_common_mask_is_one_network():
    common, independent = network(sharing="common"), network(sharing="independent")
    reward, kl = common(states())
    assert reward is kl
    assert not torch.equal(*independent(states()))
    assert 2 * sum(p.numel() for p in common.parameters()) == sum(p.numel() for p in independent.parameters())


def test_the_last_layer_alone_is_seen():
    module = network(layers="last")
    hidden = states()
    other = hidden.clone()
    other[:, :-1] = torch.nan
    assert torch.equal(module(hidden)[0], module(other)[0])


def test_dropout_is_there_in_training_only():
    module = network(dropout=0.5)
    hidden = states(200)
    assert torch.equal(module.eval()(hidden)[0], module(hidden)[0])
    masks = module.train()(hidden)[0]
    assert (masks == 0).any() and (masks > 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masks_are_float32_or_wider(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert network().to(dtype)(states().bfloat16())[0].dtype == expected


class Parent(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(3, 3)
        self.masks = TokenMasks(WIDTH, LAYERS, common=False)


def test_a_parents_state_dict_holds_nothing_of_it_and_loads_without():
    parent = Parent()
    assert parent.state_dict().keys() == {"body.weight", "body.bias"}
    assert parent.masks.state_dict() == {} and parent.masks.reward.state_dict() == {}
    other = Parent(seed=1)
    before = other.masks.mask_state()
    result = other.load_state_dict(parent.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other.body.weight, parent.body.weight)
    assert all(torch.equal(value, before[name]) for name, value in other.masks.mask_state().items())
    names = {name for name, _ in parent.named_parameters()}
    assert {"masks.reward.weight", "masks.kl.mixer", "masks.reward.norm_weight"} <= names


def tiny():
    config = LlamaConfig(
        vocab_size=31, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_save_pretrained_holds_nothing_of_it(tmp_path):
    model = tiny()
    keys = set(model.state_dict())
    model.token_masks = network()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= keys
    assert "mask" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert any(name.startswith("token_masks.") for name, _ in model.named_parameters())


def test_adapters_leave_it_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny()
    model.token_masks = network()
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert not [name for name, _ in wrapped.named_parameters() if "token_masks" in name and "lora" in name]
    wrapped.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "masks" in name]


def test_mask_state_goes_round():
    torch.manual_seed(0)
    saved = network("two_layer")
    state = saved.mask_state()
    assert state.keys() == dict(saved.named_parameters()).keys()
    torch.manual_seed(1)
    loaded = network("two_layer")
    assert not torch.equal(loaded(states())[0], saved(states())[0])
    loaded.load_mask_state(state)
    assert torch.equal(torch.stack(loaded(states())), torch.stack(saved(states())))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    # A copy: training on does not change what was taken.
    with torch.no_grad():
        saved.reward.bias += 1
    assert torch.equal(state["reward.bias"], torch.ones(LAYERS))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s.pop("kl.bias"), "lacks kl.bias"),
        (lambda s: s.update(more=torch.ones(1)), "has more, which"),
        (lambda s: s.update({"kl.bias": torch.ones(7)}), r"kl.bias is \(7,\) in the saved state and \(3,\) here"),
    ],
)
def test_a_foreign_mask_state_is_refused_whole(change, match):
    module = network()
    before = module.mask_state()
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    with pytest.raises(InputError, match=match):
        module.load_mask_state(state)
    assert all(torch.equal(value, before[name]) for name, value in module.mask_state().items())


@pytest.fixture
def mesh():
    from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_sharded_parameters_are_saved_and_loaded_whole(mesh):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain, sharded = network(), network()
    fully_shard(sharded, mesh=mesh)
    assert type(sharded.reward.weight.data).__name__ == "DTensor"
    sharded.load_mask_state(plain.mask_state())
    assert all(torch.equal(value, plain.mask_state()[name]) for name, value in sharded.mask_state().items())
    assert torch.equal(sharded(states())[0], plain(states())[0])


def test_it_outlives_the_way_by_which_accelerate_shards_a_model(mesh):
    """State dict, `to("meta")`, `fully_shard`, state dict back with `assign`."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    parent = Parent()
    expected = parent.masks.mask_state()
    body = parent.state_dict()
    parent = parent.to(torch.device("meta"))
    fully_shard(parent, mesh=mesh)
    placed = {
        name: distribute_tensor(body[name], mesh, value.placements) for name, value in parent.state_dict().items()
    }
    parent.load_state_dict(placed, assign=True)
    assert not any(parameter.is_meta for parameter in parent.parameters())
    assert all(torch.equal(value, expected[name]) for name, value in parent.masks.mask_state().items())


def test_checkpoints_of_torch_hold_nothing_of_it(mesh):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    first, second = Parent(), Parent(seed=1)
    before = second.masks.mask_state()
    state = get_model_state_dict(first, options=StateDictOptions(full_state_dict=True))
    assert state.keys() == {"body.weight", "body.bias"}
    set_model_state_dict(second, state, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(second.body.weight, first.body.weight)
    assert all(torch.equal(value, before[name]) for name, value in second.masks.mask_state().items())


def test_a_single_net_is_usable_alone():
    assert MaskNet(WIDTH, 1)(states(5, depth=1)).shape == (5,)


def test_the_sum_over_layers_is_dropped_too():
    """With 32 layers, their own dropouts alone would never leave a mask at 0."""
    torch.manual_seed(0)
    module = network(dropout=0.5, depth=32)
    masks = module(torch.randn(4000, 32, WIDTH))[0]
    assert (masks == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    # What is left counts twice, each time.
    assert masks.mean().item() == pytest.approx(1.0, abs=0.1)
