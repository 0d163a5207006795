"""Names of transformers that say what machine this is, for configurations that are made for another one."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def another_machine(processes: int) -> Iterator[None]:
    """Context in which `TrainingArguments` are those of one of so many processes, each with a GPU of its own that has bf16."""
    from transformers import TrainingArguments, training_args

    theirs = TrainingArguments.world_size, TrainingArguments.n_gpu, training_args.is_torch_bf16_gpu_available
    TrainingArguments.world_size = property(lambda self: processes)
    TrainingArguments.n_gpu = property(lambda self: 1)
    training_args.is_torch_bf16_gpu_available = lambda: True
    try:
        yield
    finally:
        TrainingArguments.world_size, TrainingArguments.n_gpu, training_args.is_torch_bf16_gpu_available = theirs
