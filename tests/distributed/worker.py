"""What both processes of the shared launch run: every case of [`cases.CASES`], results and errors into files.

accelerate launch --multi_gpu --num_processes 2 -m tests.distributed.worker OUT WORLD
"""

import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate import PartialState


def main(out: str, world: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    from tests.distributed.cases import CASES

    for name, case in CASES.items():
        folder = Path(out) / name
        if state.is_main_process:
            folder.mkdir(parents=True)
        state.wait_for_everyone()
        try:
            result = {"num_processes": PartialState().num_processes, **case(world, folder)}
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"result_{state.process_index}.pt")
        state.wait_for_everyone()
        if "error" in result:
            # The other process may be waiting in a collective of the same case: end here, with what was found.
            sys.exit(1)
    # Trainers of the cases may still hold DDP, which is not to be freed after its process group: leave everything as it is.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
