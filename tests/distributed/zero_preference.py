"""Cases of `DeltaDPOTrainer` that run under ZeRO-2 and ZeRO-3: those of `preference_sharded.py`, of which the launch has the rest."""

from functools import partial

from tests.distributed.preference_sharded import BOTH, METHODS, frozen, resumed, started


# Under ZeRO-2 nothing but the optimizer differs from DDP, and a reference model is whole.
OF_STAGE_2 = ["sparse_po", "sparse_po_untied", "lipo_feasible", "tdpo2_full"]
# What FSDP2 is tried with and ZeRO-3 is not would be one more of the same.
LEFT_OUT = ("feasible", "tdpo2_sampled", "tdpo2_untied", "mapo", "columns", "sparse_po_common", "sparse_po_bone")
OF_STAGE_3 = [name for name in METHODS if name not in LEFT_OUT]
RESUMED_AS = {"lora": {}, "full": {"adapter": None}}


def of_stages(case, *stages):
    """A case that is run in the launches of these stages, and is nothing in others."""
    return lambda world, folder, stage: case(world, folder, kind="zero") if stage in stages else {}


CASES = {
    **{
        method: of_stages(partial(frozen, method=method), *([2, 3] if method in OF_STAGE_2 else [3]))
        for method in OF_STAGE_3
    },
    **{name: of_stages(case, 3) for name, case in BOTH.items()},
    "started": of_stages(started, 2, 3),
    **{f"resumed_{name}": of_stages(partial(resumed, **changes), 2, 3) for name, changes in RESUMED_AS.items()},
}
