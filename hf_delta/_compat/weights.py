"""Names of weights in checkpoint files, which are not always their names in the model."""

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


# Parameters of each function that is called, as of transformers 5.17 to 5.23.
SEAMS: dict[str, tuple[str, ...]] = {
    "get_model_conversion_mapping": ("model", "key_mapping", "hf_quantizer", "add_legacy"),
    "rename_source_key": (
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
        "reverse",
    ),
}


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """For each name in a checkpoint of this model the name of the parameter that `from_pretrained` puts it into.

    Weights that become a part of a larger one, such as experts of a mixture, are left out.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    state = model.state_dict()
    found = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted is None:
            found[key] = name
    return found
