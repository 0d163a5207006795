"""Optimizers and schedules that cannot be made are refused before a model is loaded."""

import pytest

from hf_delta.train import main
from tests.running import keys, write


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"cycles": 1}}, "argument 'cycles'"),
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"optim": "adafactor", "optim_args": "decay"}, "Change optim, optim_args and adam_*."),
        ({"optim": "rmsprop", "optim_args": "alpha=x"}, "could not convert string to float: 'x'"),
        ({"adam_beta1": 1.0}, "Invalid beta parameter at index 0: 1.0"),
        ({"adam_epsilon": -1.0}, "adam_epsilon must be at least 0, got -1.0."),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha must be at least 0, got -1.0."),
        ({"label_smoothing_factor": 2.0}, "label_smoothing_factor must be at least 0 and at most 1, got 2.0."),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--dry_run",)], ids=["run", "dry run"])
def test_they_are_one_line_and_nothing_is_written(tmp_path, playground, capsys, changes, says, flags):
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", **changes))
    assert main([str(recipe), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {recipe}") and says in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"optim": "rmsprop", "optim_args": "alpha=0.5"},
        {"optim": "adafactor", "lr_scheduler_type": "constant"},
    ],
)
def test_those_that_can_be_made_train(tmp_path, playground, changes):
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", **changes, max_steps=1))
    assert main([str(recipe)]) == 0


def test_batches_that_are_all_left_out(tmp_path, playground, capsys):
    content = keys("sft", playground, tmp_path / "out", max_train_rows=6, max_steps=1, dataloader_drop_last=True)
    recipe = str(write(tmp_path, content))
    assert main([recipe, "--per_device_train_batch_size", "7"]) == 2
    assert "there are 6 rows to train on, and a batch of all processes takes 7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([recipe, "--per_device_train_batch_size", "6"]) == 0


def test_prompts_that_are_too_few_for_a_generation(tmp_path, playground, capsys):
    content = keys("grpo", playground, tmp_path / "out", max_train_rows=1, max_steps=1, per_device_train_batch_size=8)
    assert main([str(write(tmp_path, content))]) == 2
    assert "the data has 1 rows, and a generation batch takes 2 prompts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
