"""FSDP2 on two CPU processes, for tests only.

Accelerate chooses FSDP among accelerators alone and falls back to DDP on a CPU without a word; everything behind that choice
works on gloo. Whoever uses this must assert that parameters are DTensors, or it may test DDP.
"""

from contextlib import contextmanager

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
    },
}


@contextmanager
def fsdp_on_cpu():
    """While open, an `AcceleratorState` built with an FSDP plugin on several CPU processes shards for real."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        AcceleratorState._reset_state()
