"""What both processes of the DeepSpeed launch run; it has a launch of its own, because DeepSpeed changes a process for good.

accelerate launch --use_deepspeed ... -m tests.distributed.zero3_worker OUT WORLD
"""

import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch


KINDS = ["lora", "peft_dora", "fast_dora", "miss", "pmss", "bone", "bat_row", "edora"]


def main(out: str, world: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
    torch.set_num_threads(1)
    from tests.distributed.deepspeed_on_cpu import deepspeed_on_cpu

    with deepspeed_on_cpu():
        found = {}
        for kind in KINDS:
            for mode in ("colocate", "server") if kind == "peft_dora" else ("colocate",):
                try:
                    found[f"{kind}, {mode}"] = trained(world, Path(out) / kind / mode, kind, mode)
                except Exception:
                    found[f"{kind}, {mode}"] = {"error": traceback.format_exc()}
                    break
    torch.save(found, Path(out) / f"result_{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


KEPT = []


def trained(world, folder, kind, mode):
    from contextlib import nullcontext

    import deepspeed

    from hf_delta.adapters.dora import fast_dora
    from tests.distributed.deepspeed_on_cpu import ZERO3, not_partitioned
    from tests.distributed.through_vllm import STEPS, peft_config_of
    from tests.rl import engine
    from tests.standin_vllm import weights

    class Whole(engine.Syncs):
        """Everything that looks at the model has it gathered; the synchronisation itself has not."""

        def expected(self):
            with deepspeed.zero.GatheredParameters(list(self.trainer.model.parameters())), not_partitioned():
                return engine.merged_copy(self.trainer.model, self.world, self.peft_config())

        def state(self):
            parameters = dict(self.trainer.model.named_parameters(remove_duplicate=False))
            return {n: (p, p.ds_tensor.detach().clone(), p.ds_tensor.data_ptr()) for n, p in parameters.items()}

    def read(path, original=weights.AutoModelForCausalLM.from_pretrained):
        with not_partitioned():
            return original(path)

    weights.AutoModelForCausalLM = type("Reader", (), {"from_pretrained": staticmethod(read)})
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "max_completion_length": 4}
    settings |= {"use_cpu": False, "deepspeed": ZERO3, "vllm_mode": mode}
    with fast_dora() if kind == "fast_dora" else nullcontext():
        with engine.built(world, folder, peft_config=peft_config_of(kind), **settings) as trainer:
            syncs = Whole(trainer, world, partial(peft_config_of, kind))
            trainer.train()
    KEPT.append(trainer)
    main = trainer.accelerator.is_main_process
    return {
        "partitioned": all(hasattr(p, "ds_id") and p.numel() == 0 for p in trainer.model.parameters()),
        "wrong": syncs.wrong,
        "touched": syncs.touched,
        "merged": syncs.merged,
        "syncs": engine.engine_of(trainer).syncs if main or mode == "colocate" else None,
        "ratios": engine.logged(trainer, "sampling/importance_sampling_ratio/max") if main else [],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
