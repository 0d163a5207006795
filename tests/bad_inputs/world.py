"""What bad inputs are made of: a playground, an adapter on its model, and runs with checkpoints."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

import hf_delta.train
from hf_delta.recipe import load_recipe
from hf_delta.run.directory import finish_manifest, write_manifest
from tests.bad_inputs.case import recipe, write
from tests.running import LORA


RUNS = {
    "sft": {"peft_config": LORA},
    "dpo": {"feasible": True, "feasible_kwargs": {"epsilon": 0.3}},
    "grpo": {"loss_type": "delta_l", "steps_per_generation": 2, "num_iterations": 2, "max_steps": 3},
}


class World:
    """Directories that rows copy from; each is made when it is first asked for."""

    def __init__(self, folder: Path, playground: Path):
        self.folder, self.playground = folder, playground
        (folder / "playground").symlink_to(playground)

    @cached_property
    def model(self) -> Path:
        return self.playground / "model"

    @cached_property
    def adapter(self) -> Path:
        path = self.folder / "adapter"
        model = AutoModelForCausalLM.from_pretrained(self.model)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter += 0.01
        # As it stands in the directory where a row is tried.
        adapted.peft_config["default"].base_model_name_or_path = "playground/model"
        adapted.save_pretrained(path)
        AutoTokenizer.from_pretrained(self.model).save_pretrained(path)
        return path

    @cached_property
    def sft_run(self) -> Path:
        """As a run of two steps leaves it, without the two steps."""
        with self._here():
            write(self.folder, {"recipe.yaml": self._recipe("sft")}, self)
            write_manifest(load_recipe("recipe.yaml"), None)
        path = Path(shutil.move(self.folder / "out", self.folder / "sft_run"))
        shutil.copytree(self.adapter, path / "checkpoint-2")
        states = {
            "optimizer.pt": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "scheduler.pt": {"last_epoch": 2},
            "rng_state.pth": {"python": (), "numpy": (), "cpu": torch.zeros(3, dtype=torch.uint8)},
        }
        for name, state in states.items():
            torch.save(state, path / "checkpoint-2" / name)
        TrainerState(epoch=1.0, global_step=2, max_steps=2, train_batch_size=4).save_to_json(
            str(path / "checkpoint-2" / "trainer_state.json")
        )
        return path

    @cached_property
    def finished_run(self) -> Path:
        """As a run leaves it that came to its end."""
        path = shutil.copytree(self.sft_run, self.folder / "finished_run")
        shutil.copytree(self.adapter, path, dirs_exist_ok=True)
        shutil.copy(path / "checkpoint-2" / "trainer_state.json", path)
        finish_manifest(path)
        return path

    @cached_property
    def dpo_run(self) -> Path:
        return self._run("dpo")

    @cached_property
    def grpo_run(self) -> Path:
        return self._run("grpo")

    def _run(self, trainer: str) -> Path:
        said = io.StringIO()
        with self._here(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            write(self.folder, {"recipe.yaml": self._recipe(trainer)}, self)
            assert hf_delta.train.main(["recipe.yaml"]) == 0, said.getvalue()
        return Path(shutil.move(self.folder / "out", self.folder / f"{trainer}_run"))

    @staticmethod
    def _recipe(trainer: str) -> dict[str, Any]:
        return recipe(trainer, save_strategy="steps", save_steps=1, **RUNS[trainer])

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        there = os.getcwd()
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(there)
