"""The benchmarks run, and their figures are consistent; their numbers stand in the docs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_variance_of_updates_agrees_with_updates_themselves(monkeypatch):
    """The Gram matrix against explicit updates of random gradients, method by method."""
    module = load("delta_l_variance")
    monkeypatch.setattr(module, "PROMPTS", 6)
    monkeypatch.setattr(module, "BATCH_PROMPTS", 2)
    monkeypatch.setattr(module, "BATCHES", 50)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6 * module.GENERATIONS, 5, generator=generator) + 0.3
    lengths = torch.randint(1, 40, (6 * module.GENERATIONS,), generator=generator).double()
    found, rows = module.measured(gradients, lengths, seed=3)
    for name, coefficients in module.METHODS.items():
        updates = torch.stack([coefficients(lengths[r]) @ gradients[r].double() for r in rows])
        spread = (updates - updates.mean(0)).square().sum(1).mean().sqrt()
        assert found[name]["cv"] == pytest.approx((spread / updates.mean(0).norm()).item(), rel=1e-6)
    assert found["Dr.GRPO"]["scale"] == 1.0


@pytest.mark.slow
def test_shares_of_a_step_add_up(playground, tmp_path):
    module = load("overhead")
    forwards, (total, seconds) = module.profiled("hf_delta", playground, tmp_path, steps=2)
    assert forwards > 2 and all(value >= 0 for value in seconds.values())
    # All of ours together is inside the one call of `train`, which must be counted once.
    assert 0 < sum(seconds.values()) < total
    import cProfile
    import pstats

    trainer = module.build("hf_delta", playground, tmp_path / "again", 2, rows=64)
    profile = cProfile.Profile()
    profile.runcall(trainer.train)
    stats = pstats.Stats(profile)
    assert module._own_seconds(stats.stats)[0] == pytest.approx(stats.total_tt, rel=0.05)
