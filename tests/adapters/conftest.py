"""Fixtures of the tests of fast DoRA."""

import pytest
import torch

from hf_delta.adapters.dora import cache
from tests.adapters.dora import fast_dora, linear_of, model_of


@pytest.fixture
def fast():
    """Fast DoRA is on."""
    with fast_dora():
        yield


@pytest.fixture
def evaluations(monkeypatch):
    """A list that grows by one each time a norm is computed."""
    calls, compute = [], cache.factored_row_norms

    def counted(*args):
        calls.append(1)
        return compute(*args)

    monkeypatch.setattr(cache, "factored_row_norms", counted)
    return calls


@pytest.fixture
def no_comparing(monkeypatch):
    """As on an accelerator, where the values of adapters are not compared before a norm is used again."""
    monkeypatch.setattr(cache, "_comparable", lambda tensor: False)


@pytest.fixture
def trained(fast, evaluations, no_comparing):
    """A layer, in training, whose optimizer was seen to step; its norm is known."""
    model = model_of(linear_of())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 37)).sum().backward()
    optimizer.step()
    model.optimizer = optimizer
    model(torch.ones(2, 37))
    evaluations.clear()
    return model
