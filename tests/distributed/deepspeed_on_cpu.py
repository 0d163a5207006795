"""DeepSpeed ZeRO on two CPU processes, for tests only; `DS_ACCELERATOR=cpu` in the environment.

Accelerate leaves DeepSpeed out on a CPU, and without `use_cpu` finds no device and starts no process group; everything
behind that works on gloo.
"""

import os
from contextlib import contextmanager
from unittest.mock import patch

import transformers.integrations.deepspeed as integration
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def zero(stage):
    """The contents of a DeepSpeed configuration file."""
    settings = {"stage": stage, "overlap_comm": False, "contiguous_gradients": False}
    if stage == 3:
        # With the defaults, weights of this size would stay gathered for ever after the first step, and nothing would
        # be proven.
        settings |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    return {
        "zero_optimization": settings,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


@contextmanager
def deepspeed_on_cpu():
    """While open, a launch of several processes that finds no device goes on with gloo."""
    original = PartialState._prepare_backend

    def prepare(self, cpu=False, sagemaker_dp=False, backend=None):
        found, kind = original(self, cpu, sagemaker_dp, backend)
        if kind == DistributedType.NO and int(os.environ.get("LOCAL_RANK", -1)) != -1:
            return "gloo", DistributedType.MULTI_CPU
        return found, kind

    with patch.object(PartialState, "_prepare_backend", prepare):
        yield


@contextmanager
def not_partitioned():
    """While open, models are built whole, and not as the trained one is."""
    with patch.object(integration, "_hf_deepspeed_config_weak_ref", None):
        yield
