"""Plugin for a pytest run over PEFT's own tests: our configurations in the place of the rows of its test matrix.

PEFT's tests are parametrised over lists of rows (name, model, configuration class, its arguments). The lists are exchanged
before the tests are collected, and what is left over, tests of single methods of PEFT, is not run. `peft_matrix.py` says
how it is started; it expects PEFT's tests as package `peft_tests`.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from hf_delta.adapters import ADAPTERS
from hf_delta.adapters.base import DeltaAdapterConfig, DeltaLinear


THEIRS = {"LoRA": (peft.LoraConfig, {}), "MiSS": (peft.MissConfig, {})}
OURS_BY_METHOD = {
    "pmss": {"PMSS": {"normalize": False}, "PMSS normalised": {"normalize": True}},
    "bone": {
        "Bone": {"mode": "bone"},
        "Bone row": {"mode": "row"},
        "Bone mini": {"mode": "mini", "mini_r": 2},
        "Bone bat_row": {"mode": "bat_row"},
        "Bone bat_col": {"mode": "bat_col"},
    },
    "edora": {"EDoRA": {"magnitude": True}, "EDoRA without magnitude": {"magnitude": False}},
}
OURS = {
    label: (ADAPTERS[method][0], kwargs)
    for method, variants in OURS_BY_METHOD.items()
    if method in ADAPTERS
    for label, kwargs in variants.items()
}
VARIANTS = {**OURS, **THEIRS}

# PEFT's MLP has layers 10 -> 20 -> 2, so r must be 2.
MLP_TARGETS = [
    {"target_modules": "lin0"},
    {"target_modules": ["lin1"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
]
# Its EmbConv1D has a Conv1D 5 -> 1. PEFT's tests of MiSS leave it out, because MiSS takes no Conv1D.
CONV1D_TARGET = {"target_modules": ["conv1d"], "r": 1}
# The change of PMSS is of second order in the weights, which are small there: scaled up, three steps of training show.
CONV1D_CHANGES = {"Bone mini": {"mini_r": 1}, "PMSS": {"alpha": 16.0}}

# PEFT skips some tests by the name of the model, so these say neither llama nor gpt2.
DECODERS = {
    "tiny-decoder": LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=1024,
        attention_bias=True,
    ),
    "tiny-conv1d": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=1024),
}


def matrix_rows():
    for label, (config, kwargs) in VARIANTS.items():
        for number, target in enumerate(MLP_TARGETS, 1):
            yield f"MLP {number} {label}", "MLP", config, {"r": 2, **kwargs, **target}
        if label != "MiSS":
            row = {**kwargs, **CONV1D_TARGET, **CONV1D_CHANGES.get(label, {})}
            yield f"EmbConv1D {label}", "EmbConv1D", config, row


def two_adapter_rows():
    for label, (config, kwargs) in VARIANTS.items():
        start = "init_lora_weights" if config is peft.LoraConfig else "init_weights"
        for name, second in (("Same", "lin0"), ("Different", "lin1")):
            both = [{"r": 2, **kwargs, "target_modules": [layer], start: False} for layer in ("lin0", second)]
            yield f"{label} {name}", "lora" if config is peft.LoraConfig else label, config, *both


def mixed_batch_rows():
    for label in VARIANTS:
        if label != "MiSS":
            yield f"{label} mixed adapter", trained(label, r=2), trained(label, r=10)


def trained(label, target_modules=("lin0",), r=2, **changes):
    """A configuration for PEFT's MLP whose adapters are not the identity."""
    config, kwargs = VARIANTS[label]
    start = {"init_lora_weights" if config is peft.LoraConfig else "init_weights": False}
    return config(target_modules=list(target_modules), r=r, **{**kwargs, **start, **changes})


def extend_single_tests(custom):
    """Add ours to tests that list a few methods each in their own decorator."""
    single, mixed, default = (
        custom.TestPeftCustomModel,
        custom.TestMixedAdapterBatches,
        custom.TestDefaultTargetModules,
    )
    for label, (config, kwargs) in OURS.items():
        rows_of(single.test_adapter_name_makes_no_difference).append(trained(label))
        rows_of(mixed.test_mixed_adapter_batches_lora_wrong_adapter_name_raises).append((label, trained(label)))
        pairs = {
            "different_target_layers": (trained(label), trained(label, ["lin1"])),
            "partly_overlapping_target_layers": (trained(label), trained(label, ["lin0", "lin1"])),
            "multiple_modules_to_save": [trained(label, modules_to_save=["lin1"]) for _ in range(2)],
            "unsupported_layer_raises": [trained(label, modules_to_save=["gru"]) for _ in range(2)],
        }
        for name, pair in pairs.items():
            rows_of(getattr(mixed, f"test_mixed_adapter_batches_{name}")).append((label, *pair))
        # The default r is larger than the layers of this model.
        small = functools.partial(config, r=2, **kwargs)
        for test in (
            single.test_multiple_adapters_mixed_modules_to_save,
            single.test_multiple_adapters_mixed_modules_to_save_order_switched,
            default.test_default_target_modules_not_set_raises,
            default.test_default_target_modules_not_set_model_type_set_raises,
            default.test_default_target_modules_list_of_str,
            default.test_default_target_modules_str,
        ):
            rows_of(test).append(small)


def rows_of(test):
    return next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")


def decoder_rows():
    return [
        # With PEFT's own r for LoRA, which a test of weighted adapters counts on.
        (
            config,
            {"task_type": "CAUSAL_LM", "target_modules": None, "r": 8 if config is peft.LoraConfig else 2, **kwargs},
        )
        for config, kwargs in VARIANTS.values()
    ]


# -- adapters that have left the identity ---------------------------------------------------------------------------
def accept_init_weights(config_class):
    """PEFT's tests write `init_weights=False` for an adapter that is not the identity; ours have no such field."""
    construct = config_class.__init__

    @functools.wraps(construct)
    def init(self, *args, init_weights=True, **kwargs):
        construct(self, *args, **kwargs)
        self.is_trained_for_test = not init_weights

    config_class.__init__ = init


def leave_the_identity():
    update_layer = DeltaLinear.update_layer

    @functools.wraps(update_layer)
    def update(self, adapter_name, config):
        update_layer(self, adapter_name, config)
        if getattr(config, "is_trained_for_test", False) and not self.is_placeholder(config):
            with torch.no_grad():
                for weights in self.adapter_modules:
                    if adapter_name in weights:
                        weight = weights[adapter_name].weight
                        weight.add_(0.3 * torch.randn_like(weight))

    DeltaLinear.update_layer = update


def not_the_identity(theirs):
    @functools.wraps(theirs)
    def set_init_weights_false(config_cls, kwargs):
        if issubclass(config_cls, DeltaAdapterConfig):
            return {**kwargs, "init_weights": False}
        return theirs(config_cls, kwargs)

    return set_init_weights_false


# -- pytest ---------------------------------------------------------------------------------------------------------
def import_their_tests():
    pytest.register_assert_rewrite("peft_tests")
    # testing_common imports a class of diffusers to compare with; none of these tests makes one.
    stub = importlib.util.find_spec("diffusers") is None
    if stub:
        sys.modules["diffusers"] = ModuleType("diffusers")
        sys.modules["diffusers"].__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    try:
        return [
            importlib.import_module(f"peft_tests.{name}") for name in ("test_custom_models", "test_decoder_models")
        ]
    finally:
        if stub:
            del sys.modules["diffusers"]


def save_decoders(folder):
    for name, config in DECODERS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return [str(folder / name) for name in DECODERS]


def pytest_configure(config):
    config.matrix_results = Path(os.environ["PEFT_MATRIX_RESULTS"])
    custom, decoder = import_their_tests()
    for config_class in {config_class for config_class, _ in OURS.values()}:
        accept_init_weights(config_class)
    leave_the_identity()
    for module in (custom, decoder):
        module.set_init_weights_false = not_the_identity(module.set_init_weights_false)
    # The lists themselves, which the marks of the tests refer to.
    custom.TEST_CASES[:] = matrix_rows()
    custom.ALL_PEFT_CONFIG_CLASSES[:] = dict.fromkeys(config_class for config_class, _ in VARIANTS.values())
    custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = two_adapter_rows()
    custom.MIXED_ADAPTER_TEST_CASES[:] = mixed_batch_rows()
    extend_single_tests(custom)
    decoder.PEFT_DECODER_MODELS_TO_TEST[:] = save_decoders(config.matrix_results.parent)
    decoder.ALL_CONFIGS[:] = decoder_rows()


def variant_of(params):
    """Label of the row that a test was given, None if it is no row of the matrix."""
    given = next((params[name] for name in ("config_cls", "config0", "config") if name in params), None)
    if isinstance(given, peft.PeftConfig):
        config, kwargs = type(given), vars(given)
    elif isinstance(given, functools.partial):
        config, kwargs = given.func, given.keywords
    else:
        config, kwargs = given, params.get("config_kwargs") or params.get("config_kwargs_1") or {}
    if config is peft.MissConfig and params.get("model_id", "").endswith("tiny-conv1d"):
        return None
    for label, (config_class, fixed) in VARIANTS.items():
        if config_class is config and all(
            kwargs.get(key, value) == value for key, value in fixed.items() if key != "mini_r"
        ):
            return label
    return None


def pytest_collection_modifyitems(config, items):
    chosen = []
    for item in items:
        if hasattr(item, "callspec") and (label := variant_of(item.callspec.params)) is not None:
            item.user_properties.append(("variant", label))
            chosen.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    # Under FSDP 1 weights are views, on which nothing is fused, and fused arithmetic rounds differently: these tests
    # compare an output under FSDP with one without it to the last bit.
    sharded = item.cls is not None and item.cls.__name__ == "TestPeftFsdpStateDict"
    unfused = mock.patch.object(DeltaLinear, "_can_fuse", lambda *args: False) if sharded else contextlib.nullcontext()
    with unfused:
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
        result = {
            "variant": dict(item.user_properties)["variant"],
            "test": item.originalname,
            "id": item.callspec.id,
            "outcome": report.outcome,
            "message": str(call.excinfo.value)[:500] if call.excinfo else "",
        }
        with item.config.matrix_results.open("a") as file:
            file.write(json.dumps(result) + "\n")
