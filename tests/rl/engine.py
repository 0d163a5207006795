"""Trainers whose rollouts come from the stand-in engine, and what to look at when weights go to it."""

from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer
from tests.rl.frozen import PROMPTS, dataset, frozen_reward
from tests.rl.test_trainer import config
from tests.standin_vllm import standin_vllm


@contextmanager
def built(world, out, cls=DeltaGRPOTrainer, config_cls=DeltaGRPOConfig, reward=frozen_reward, rows=PROMPTS, **changes):
    """A trainer whose rollouts come from the stand-in engine; `model_kwargs` go to `from_pretrained`.

    With `trained_before` the adapter is in the model already, and TRL makes a reference of it.
    """
    kwargs = {"peft_config": changes.pop("peft_config", None)}
    loading, trained_before = changes.pop("model_kwargs", {}), changes.pop("trained_before", False)
    args = config(out, config_cls, use_vllm=True, **{"vllm_mode": "colocate", **changes})
    data = dataset(rows)
    data = data.add_column("prompt_id", data["prompt"][:])
    with standin_vllm(serves=world):
        model = AutoModelForCausalLM.from_pretrained(world, **loading)
        if trained_before:
            model = get_peft_model(model, kwargs.pop("peft_config"))
        yield cls(model, reward, args, data, processing_class=AutoTokenizer.from_pretrained(world), **kwargs)


def engine_of(trainer):
    backend = trainer.vllm_generation
    return backend.llm if backend.mode == "colocate" else backend.vllm_client.llm


def logged(trainer, name):
    found = [row[name] for row in trainer.state.log_history if name in row]
    assert len(found) == trainer.state.global_step
    return found


def assert_ratio_is_one(trainer, tolerance=1e-4):
    for end in ("min", "max"):
        ratios = logged(trainer, f"sampling/importance_sampling_ratio/{end}")
        assert ratios == pytest.approx([1.0] * len(ratios), abs=tolerance)


def unequal(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def full(tensor):
    """Collective where the tensor is sharded by FSDP2."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def merged_copy(model, world, peft_config):
    """The weights of a copy in one piece of a trained model, merged for good by PEFT; collective."""
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(world), peft_config)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
            tensor.copy_(full(held[name]))
    return dict(whole.merge_and_unload().named_parameters())


class Syncs:
    """Looks at engine and model whenever weights go out.

    Attributes:
        wrong (`list[list[str]]`): for each synchronisation, names of the engine's weights that are not those of the merged model.
        touched (`list[str]`): parameters that were other ones, or had other bits, after a synchronisation than before.
        merged (`int`): how often a layer of the trained model was found merged, or its base another one, while weights went out.
        received (`list[dict[str, torch.Tensor]]`): for each synchronisation, the engine's weights.
    """

    def __init__(self, trainer, world, peft_config):
        self.trainer, self.world, self.peft_config = trainer, world, peft_config
        self.wrong, self.touched, self.merged, self.received = [], [], 0, []
        generation = trainer.vllm_generation
        self._sync, self._iterate = generation.sync_weights, generation._iter_named_params
        generation.sync_weights, generation._iter_named_params = self.sync, self.iterate

    def sync(self):
        expected = self.expected()
        before = self.state()
        self._sync()
        after = self.state()
        assert before.keys() == after.keys()
        for name, (parameter, value, pointer) in before.items():
            now, bits, where = after[name]
            if now is not parameter or where != pointer or not torch.equal(bits, value):
                self.touched.append(name)
        if self.trainer.vllm_mode == "colocate" or self.trainer.accelerator.is_main_process:
            self.received.append(engine_of(self.trainer).weights())
            self.wrong.append(unequal(self.received[-1], expected))

    def iterate(self):
        model = self.trainer.model
        parameters = list(map(id, model.parameters()))
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for item in self._iterate():
            self.merged += any(layer.merged for layer in layers)
            self.merged += parameters != list(map(id, model.parameters()))
            yield item

    def expected(self):
        return merged_copy(self.trainer.model, self.world, self.peft_config())

    def state(self):
        parameters = self.trainer.model.named_parameters(remove_duplicate=False)
        return {n: (p, local(p).clone(), local(p).data_ptr()) for n, p in parameters}


def assert_exact(syncs, count):
    """The engine had the merged weights at each of `count` synchronisations, others each time, and nothing was touched."""
    assert syncs.wrong == [[]] * count
    assert syncs.touched == [] and syncs.merged == 0
    for before, after in zip(syncs.received, syncs.received[1:]):
        assert unequal(before, after)
