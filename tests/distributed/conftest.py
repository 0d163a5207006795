"""One launch of two processes for all fast tests of this folder, and one for each stage of ZeRO."""

from functools import cache

import pytest

from tests.distributed.launching import launched
from tests.rl.frozen import build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def two_processes(world, tmp_path_factory):
    """Runs every case of `cases.py` once and returns `case -> [result of rank 0, result of rank 1]`."""
    return launched("tests.distributed.cases", tmp_path_factory.mktemp, world)


@pytest.fixture(scope="session")
def zero(world, tmp_path_factory):
    """`(case, stage) -> [result of rank 0, result of rank 1]` of `zero_cases.py`: stage 2 or 3 of ZeRO, or 0 for DDP.

    Each stage has a launch of its own, in which every case runs once.
    """
    launch = cache(lambda stage: launched("tests.distributed.zero_cases", tmp_path_factory.mktemp, world, stage))
    return lambda case, stage: launch(stage)(case)


@pytest.fixture(scope="session")
def zero3_through_vllm(world, tmp_path_factory):
    """Runs every case of `zero3_through_vllm.py` once, in a launch of its own."""
    return launched("tests.distributed.zero3_through_vllm", tmp_path_factory.mktemp, world, 3)
