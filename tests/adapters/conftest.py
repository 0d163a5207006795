"""Fixtures of the tests of fast DoRA."""

import pytest

from hf_delta.adapters.dora import cache
from tests.adapters.dora import fast_dora


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
