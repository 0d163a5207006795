"""What constructors of trainers refuse, in words of a recipe."""

import logging
import pickle
import re

from jinja2 import TemplateError
from peft import NoMatchingPeftModuleError
from safetensors import SafetensorError

from hf_delta.errors import InputError
from hf_delta.recipe.launch import of_launches
from hf_delta.run.fits import NO_TEMPLATE


logger = logging.getLogger(__name__)

# What they raise for models, tokenizers, templates and settings that do not work.
REFUSALS = (
    ValueError,
    TypeError,
    ImportError,
    RuntimeError,
    OSError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
    TemplateError,
    re.error,
)


def refusal(error: Exception, source: str) -> InputError:
    """The error of a constructor as one of the recipe; errors of ours stay as they are."""
    if isinstance(error, InputError):
        return error
    logger.debug("The constructor of the trainer failed.", exc_info=error)
    said = str(error).strip() or type(error).__name__
    if "chat_template is not set" in said:
        return InputError(f"{source}: {NO_TEMPLATE}")
    if isinstance(error, NoMatchingPeftModuleError):
        return InputError(f"{source}: peft_config: {said.splitlines()[0]} With --dry_run the layers are named.")
    if isinstance(error, TemplateError) or _in_template(error):
        where = "Correct it, or write chat_template_path: <another>."
        return InputError(f"{source}: the chat template of the tokenizer fails: {said.rstrip('.')}. {where}")
    # A ValueError is meant to be read; of the others the kind says more than the words.
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return InputError(f"{source}: {kind}{of_launches(said)}")


def _in_template(error: BaseException) -> bool:
    """Whether an error was raised by an expression of a chat template."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            return True
        trace = trace.tb_next
    return False
