"""Weights on their way to the engine from two processes under DeepSpeed ZeRO-3."""

from contextlib import nullcontext
from functools import partial

from hf_delta.adapters.dora import fast_dora
from tests.distributed.deepspeed_on_cpu import not_partitioned
from tests.distributed.through_vllm import FAST_DORA, STEPS, peft_config_of
from tests.distributed.zero_cases import is_partitioned
from tests.rl import engine
from tests.standin_vllm import weights


KINDS = ["lora", "peft_dora", FAST_DORA, "miss", "pmss", "bone", "bat_row", "edora"]
KEPT = []


class Whole(engine.Syncs):
    """Everything that looks at the model has it gathered; the synchronisation itself has not."""

    def expected(self):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.trainer.model.parameters())), not_partitioned():
            return engine.merged_copy(self.trainer.model, self.world, self.peft_config())

    def state(self):
        parameters = dict(self.trainer.model.named_parameters(remove_duplicate=False))
        return {n: (p, p.ds_tensor.detach().clone(), p.ds_tensor.data_ptr()) for n, p in parameters.items()}


class WholeModel:
    """In the place of the class with which the engine reads its model."""

    @staticmethod
    def from_pretrained(path, original=weights.AutoModelForCausalLM.from_pretrained):
        with not_partitioned():
            return original(path)


def trained(world, folder, stage, kind, mode="colocate"):
    weights.AutoModelForCausalLM = WholeModel
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "max_completion_length": 4}
    settings |= {"use_cpu": False, "vllm_mode": mode}
    with fast_dora() if kind == FAST_DORA else nullcontext():
        with engine.built(world, folder, peft_config=peft_config_of(kind), **settings) as trainer:
            syncs = Whole(trainer, world, partial(peft_config_of, kind))
            trainer.train()
    KEPT.append(trainer)
    main = trainer.accelerator.is_main_process
    return {
        "partitioned": is_partitioned(trainer),
        "wrong": syncs.wrong,
        "touched": syncs.touched,
        "merged": syncs.merged,
        "syncs": engine.engine_of(trainer).syncs if main or mode == "colocate" else None,
        "ratios": engine.logged(trainer, "sampling/importance_sampling_ratio/max") if main else [],
    }


CASES = {
    **{kind: partial(trained, kind=kind) for kind in KINDS},
    "peft_dora_server": partial(trained, kind="peft_dora", mode="server"),
}
