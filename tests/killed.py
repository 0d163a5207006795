"""Runs of recipes that are killed, in children of one process that has imported everything: `python -m tests.killed JOB`.

`JOB` is a JSON file `{"recipe": FILE, "out": DIRECTORY, "kills": [...]}`. A straight run goes to `DIRECTORY/straight`; another
one to `DIRECTORY/killed`, which is killed as each kill says and resumed, and at last left alone. Every exit status is written to
`DIRECTORY/statuses.json`. A kill is

    {"at": PLACE, "call": 3, "when": "before" | "half" | "after", "signal": 9}

at the third call of what is called there since training began, counted anew in each resumed run.

Under a launcher a `JOB` is `{"arguments": [...], "rank": 1, "kill": {...}}`: one run, in which one process may be killed.
"""

import json
import os
import sys
import traceback
from pathlib import Path


class Place:
    """Replaces a function by one that sends a signal to its process at one of its calls."""

    def __init__(self, module, name, half=None):
        self.module, self.name, self.half = module, name, half
        self.original = getattr(module, name)

    def arm(self, call: int, when: str, number: int) -> None:
        calls = [0]

        def armed(*args, **kwargs):
            calls[0] += 1
            if calls[0] != call:
                return self.original(*args, **kwargs)
            if when == "half":
                self.half(self.original, *args, **kwargs)
            elif when == "after":
                self.original(*args, **kwargs)
            os.kill(os.getpid(), number)
            return self.original(*args, **kwargs)

        setattr(self.module, self.name, armed)


class AnyOperation:
    """Of torch: somewhere in a forward or backward pass, in sampling, in the optimizer, or while states are copied."""

    def arm(self, call: int, when: str, number: int) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        class Counter(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                Counter.calls += 1
                if Counter.calls == call:
                    os.kill(os.getpid(), number)
                return function(*args, **(kwargs or {}))

        Counter().__enter__()


def half_a_file(save, content, path, *args, **kwargs):
    """As if killed in the middle of writing: what is there is the beginning of the file."""
    save(content, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


def half_a_text(save, state, path):
    save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)


def half_a_directory(remove, path, *args, **kwargs):
    for file in sorted(Path(path).iterdir())[::2]:
        file.unlink()


def places() -> dict[str, Place]:
    import accelerate
    import torch
    import transformers
    from transformers import trainer_utils

    import hf_delta.checkpoint

    return {
        "operation": AnyOperation(),
        "generation": Place(torch, "multinomial"),
        "backward": Place(accelerate.Accelerator, "backward"),
        "step": Place(torch.optim.AdamW, "step"),
        "torch file": Place(torch, "save", half_a_file),
        "state file": Place(hf_delta.checkpoint, "save_file", half_a_file),
        "model file": Place(transformers.Trainer, "save_model"),
        "last file": Place(transformers.TrainerState, "save_to_json", half_a_text),
        "rotation": Place(trainer_utils.shutil, "rmtree", half_a_directory),
    }


def arm_when_training_begins(armed: dict) -> None:
    from transformers import TrainerCallback, trainer

    class Begun(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            places()[armed["at"]].arm(armed["call"], armed["when"], armed["signal"])

    trainer.DEFAULT_CALLBACKS.append(Begun)


def child(recipe: str, flags: list[str], armed: dict | None) -> int:
    """Run a recipe in a child of its own, and return its exit status; minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            from hf_delta.train import main

            if armed:
                arm_when_training_begins(armed)
            status = main([recipe, *flags])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(job: str) -> None:
    job = json.loads(Path(job).read_text())
    import torch

    import hf_delta.train

    torch.set_num_threads(1)
    if "arguments" in job:
        if job.get("kill") and os.environ["RANK"] == str(job["rank"]):
            arm_when_training_begins(job["kill"])
        sys.exit(hf_delta.train.main(job["arguments"]))
    out = Path(job["out"])
    statuses = [child(job["recipe"], ["--output_dir", str(out / "straight")], None)]
    for armed in [*job["kills"], None]:
        statuses.append(child(job["recipe"], ["--output_dir", str(out / "killed"), "--resume"], armed))
    (out / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
