"""TRL's SFT, saved whole wherever it is sharded."""

from trl import SFTTrainer

from hf_delta._compat.whole_saves import WholeSaves
from hf_delta.resume import Resumable


class DeltaSFTTrainer(Resumable, WholeSaves, SFTTrainer):
    """Drop-in for [`~trl.SFTTrainer`] that trains bit for bit like it.

    Under FSDP with `SHARDED_STATE_DICT` its checkpoints hold the adapter, and `save_model` writes an adapter or a whole model;
    TRL's write neither. Under FSDP2 a head that is trained beside an adapter gets the gradient of all processes.
    `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end.
    """
