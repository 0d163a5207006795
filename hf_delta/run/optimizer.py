"""Can the optimizer of a recipe and its schedule be made? Asked before the model is loaded, on two numbers."""

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from hf_delta.errors import InputError
from hf_delta.run.refusals import REFUSALS


# They look at the modules of a model.
_OF_A_MODEL = ("galore", "apollo", "lomo", "adalomo")
_STEPS = 10


def check_optimizer_and_schedule(training: TrainingArguments, source: str) -> None:
    """
    Raises:
        `InputError`: one of them cannot be made: a package is missing, or a value is none that it takes.
    """
    kind = str(getattr(training.optim, "value", training.optim))
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=training.learning_rate)
    try:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(training, None)
        if not kind.startswith(_OF_A_MODEL):
            optimizer = make([parameter], **settings)
    except REFUSALS as error:
        if not kind.startswith(_OF_A_MODEL) or isinstance(error, ImportError):
            raise _refusal(f"optim: {kind}", error, source, "optim, optim_args and adam_*") from error
    schedule = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=training.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except REFUSALS as error:
        named = "lr_scheduler_type and lr_scheduler_kwargs"
        raise _refusal(f"lr_scheduler_type: {schedule}", error, source, named) from error


def _refusal(what: str, error: Exception, source: str, keys: str) -> InputError:
    said = str(error).strip().rstrip(".") or type(error).__name__
    return InputError(f"{source}: {what} does not work with what is set ({said}). Change {keys}.")
