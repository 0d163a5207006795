"""Models and checks for the tests of merged rollouts."""

import copy
from contextlib import contextmanager

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.adapters.life import DORA, KINDS, adapted, base_model, logits


LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# Methods of PEFT that can merge: configuration class, and what it takes besides target modules.
METHODS = {
    "lora": (peft.LoraConfig, {"r": 4}),
    "rslora": (peft.LoraConfig, {"r": 4, "use_rslora": True}),
    "pissa": (peft.LoraConfig, {"r": 4, "init_lora_weights": "pissa"}),
    "olora": (peft.LoraConfig, {"r": 4, "init_lora_weights": "olora"}),
    "peft_dora": (peft.LoraConfig, {"r": 4, "use_dora": True}),
    "lora_bias": (peft.LoraConfig, {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "bias_trained": (peft.LoraConfig, {"r": 4, "bias": "lora_only"}),
    "tokens": (peft.LoraConfig, {"r": 4, "trainable_token_indices": [1, 2]}),
    "head_trained": (peft.LoraConfig, {"r": 4, "modules_to_save": ["lm_head"]}),
    "parameter": (peft.LoraConfig, {"r": 4, "target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "adalora": (peft.AdaLoraConfig, {"total_step": 100}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}),
    "c3a": (peft.C3AConfig, {"block_size": 4}),
    "deft": (peft.DeftConfig, {}),
    "delora": (peft.DeloraConfig, {"r": 4}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 50}),
    "hira": (peft.HiraConfig, {"r": 4}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}),
    "layer_norm": (peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "loha": (peft.LoHaConfig, {}),
    "lokr": (peft.LoKrConfig, {}),
    "miss": (peft.MissConfig, {"r": 8}),
    "miss_bat": (peft.MissConfig, {"r": 8, "init_weights": "bat"}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    "randlora": (peft.RandLoraConfig, {"r": 4}),
    "road": (peft.RoadConfig, {"group_size": 4}),
    "shira": (peft.ShiraConfig, {"r": 4}),
    "vblora": (peft.VBLoRAConfig, {"num_vectors": 10, "vector_length": 4, "topk": 2}),
    "vera": (peft.VeraConfig, {"r": 8}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 50}),
}


def model_of(kind, dtype=torch.float32, **changes):
    """A model in evaluation mode with one adapter of a kind, ours or PEFT's, that changes what it computes."""
    if kind in KINDS | DORA:
        return adapted(kind, base_model(dtype), **changes).eval()
    cls, fields = METHODS[kind]
    torch.manual_seed(0)
    config = cls(**{"target_modules": LORA["target_modules"], "task_type": "CAUSAL_LM", **fields, **changes})
    return move(peft.get_peft_model(base_model(dtype), config)).eval()


def move(model, seed=1):
    """Change every trained weight, however it is named."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


# What layers of ours note for good when they are used: which adapters were checked, and what kind the base layer is of.
LASTING = ("unchecked", "quantization_backend")


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def state_of(model):
    """Everything that a module keeps, by identity, plain values and contents of containers by value."""

    def plain(value):
        if isinstance(value, (list, tuple, set, dict, str, int, float, bool)) or value is None:
            return repr(value) if not isinstance(value, dict) else [(key, id(value[key])) for key in value]
        return id(value)

    return [
        (name, key, plain(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in LASTING
    ]


@contextmanager
def everything_stays(model):
    """Fails unless, after the block, the model holds the same objects in the same places with the same bits."""
    found = dict(model.named_parameters(remove_duplicate=False))
    kept = [(p, p.data_ptr(), p.requires_grad, p.detach().clone()) for p in found.values()]
    state = state_of(model)
    yield
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(found)
    for (name, parameter), (original, pointer, requires_grad, value) in zip(now.items(), kept):
        assert parameter is original, name
        assert parameter.data_ptr() == pointer and parameter.requires_grad == requires_grad, name
        assert torch.equal(parameter, value), name
    after = state_of(model)
    assert not [now for now, before in zip(after, state) if now != before]
    assert len(after) == len(state)


def truly_merged(model):
    """The logits of a copy of which the adapters were merged for good."""
    return logits(copy.deepcopy(model).merge_and_unload())
