"""Whole tensors out of parameters that belong to DeepSpeed ZeRO-3, by a stand-in that takes memory back as it does."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_delta.adapters.stream import merged_weights
from hf_delta.errors import InputError
from hf_delta.ops.gather import full_shape, full_tensor, gathered, is_partitioned, is_sharded
from hf_delta.preference.resume import MASK_FILE, ResumableDPO
from hf_delta.preference.weights import SparsePOWeights
from tests.adapters.life import adapted, perturb


@pytest.fixture
def partition(monkeypatch):
    """`tensor or module -> the same`, with nothing of its parameters in this process unless they are gathered."""
    parts = {}

    @contextmanager
    def gathered_parameters(parameters):
        for parameter in parameters:
            parameter.data = parts[id(parameter)].clone()
        yield
        for parameter in parameters:
            # Whoever kept it sees that the memory is no longer theirs.
            parameter.data.fill_(float("nan"))
            parameter.data = torch.empty(0)

    def cut(given):
        for parameter in [given] if isinstance(given, torch.Tensor) else list(given.parameters()):
            parts[id(parameter)] = parameter.data.clone()
            parameter.ds_id, parameter.ds_shape, parameter.ds_numel = len(parts), parameter.shape, parameter.numel()
            parameter.data = torch.empty(0)
        return given

    zero = SimpleNamespace(GatheredParameters=gathered_parameters)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    return cut


def test_a_partitioned_parameter(partition):
    values = torch.arange(6.0).view(2, 3)
    parameter = partition(nn.Parameter(values.clone()))
    assert parameter.shape == (0,) and is_partitioned(parameter) and is_sharded(parameter)
    assert full_shape(parameter) == (2, 3)
    assert torch.equal(full_tensor(parameter), values)
    with gathered(None, parameter, parameter):
        with gathered(parameter):
            pass
        # What is whole already is left to whoever has gathered it.
        assert is_partitioned(parameter) and not is_sharded(parameter)
        assert torch.equal(full_tensor(parameter), values)
    assert parameter.shape == (0,)


def test_a_plain_one_is_as_it_is():
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert not is_partitioned(parameter) and not is_sharded(parameter) and full_shape(parameter) == (2, 3)
    with gathered(parameter):
        assert full_tensor(parameter).data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("kind", ["dora", "bone", "edora"])
def test_streamed_weights_outlive_the_gathering(partition, kind):
    model = perturb(adapted(kind))
    expected = {name: tensor.clone() for name, tensor in merged_weights(model)}
    found = dict(merged_weights(partition(model)))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_masks_that_deepspeed_has_restored_are_those_of_the_file(partition, tmp_path):
    """Nothing is loaded into shards; what is in them and in the file is compared."""
    torch.manual_seed(0)
    network = SparsePOWeights(net="simple", layers="all", sharing="independent", dropout=0.0).network(8, 2)
    torch.manual_seed(1)
    other = SparsePOWeights(net="simple", layers="all", sharing="independent", dropout=0.0).network(8, 2)
    save_file(network.mask_state(), tmp_path / MASK_FILE)
    load, trainer = ResumableDPO._load_masks, SimpleNamespace(mask_network=partition(network))
    load(trainer, tmp_path / MASK_FILE)
    state = network.mask_state()
    for saved in (other.mask_state(), dict(list(state.items())[1:]), state | {"another.weight": torch.zeros(1)}):
        save_file(saved, tmp_path / MASK_FILE)
        with pytest.raises(InputError, match="the mask network that DeepSpeed has restored differ"):
            load(trainer, tmp_path / MASK_FILE)
