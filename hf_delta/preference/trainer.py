"""DPO."""

from hf_delta._compat.trl import DPOHooks


class DeltaDPOTrainer(DPOHooks):
    """TRL's `DPOTrainer`, with the right reference for every adapter of PEFT.

    Given a `PeftModel`, TRL 1.16 copies only those weights of the adapter into the reference whose names end in
    `.<adapter>.weight`; with others (MiSS, VeRA, LoHa, ...) a policy that has been trained before is compared with the base
    model. Where nothing is to be repaired, it trains bit for bit like `trl.DPOTrainer`.
    """
