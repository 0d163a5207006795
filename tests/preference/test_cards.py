"""What a model card says of the method."""

import pytest

from tests.preference.dpo import build
from tests.rl.frozen import build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({}, "2305.18290"),
        ({"loss_type": "sparse_po"}, "2410.05102"),
        ({"loss_type": "mapo"}, "2410.05102"),
        ({"loss_type": "tdpo2"}, "2404.11999"),
        ({"loss_type": "d2po"}, "2502.14340"),
        ({"loss_type": "lipo_lambda"}, "2402.01878"),
        ({"feasible": True, "feasible_kwargs": {"epsilon": 0.3}}, "2501.14912"),
        ({"loss_type": "tdpo1", "feasible": True, "feasible_kwargs": {"epsilon": 0.3}}, "2404.11999"),
    ],
    ids=str,
)
def test_the_card_cites_the_paper_of_the_loss(world, tmp_path, keys, number):
    build(world, tmp_path, **keys).create_model_card(model_name="mine")
    assert f"papers/{number}" in (tmp_path / "README.md").read_text()
