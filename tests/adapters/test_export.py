"""Adapters as plain LoRA: the same model in a fresh process with PEFT alone, and what is said of the error."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping, core_model_loading

from hf_delta import InputError, to_lora
from hf_delta._compat.weights import SEAMS
from hf_delta.adapters.export import export_lora, export_merged
from hf_delta.adapters.export.limits import VLLM_RANKS
from tests.adapters import life
from tests.adapters.life import IDS, adapted, base_model, gpt2_model, logits, perturb


# Of PEFT, with everything that changes a LoRA's scale or rank from module to module.
PATTERNS = {
    "r": 5,
    "lora_alpha": 7,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 11},
    "alpha_pattern": {"up_proj": 3},
}
PEFT_KINDS = {
    "lora": (LoraConfig, PATTERNS),
    "miss": (MissConfig, {"r": 8}),
    "miss_mini": (MissConfig, {"r": 8, "init_weights": "mini", "mini_r": 4}),
    "adalora": (AdaLoraConfig, {"init_r": 4, "total_step": 10, "target_modules": ["q_proj", "up_proj"]}),
    "miss_bat": (MissConfig, {"r": 8, "init_weights": "bat", "target_modules": ["q_proj", "o_proj"]}),
}
KINDS = {**life.KINDS, **life.DORA, **PEFT_KINDS}
LOSSY = ["bat_row", "bat_col", "edora", "dora", "miss_bat"]
# The change of AdaLoRA has low rank, but is not kept as two factors.
TRUNCATED = [*LOSSY, "adalora"]
EXACT = [kind for kind in KINDS if kind not in TRUNCATED]

COMPARE = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
root, kinds = sys.argv[1], sys.argv[2:]
found = {}
for kind in kinds:
    expected = load_file(f"{root}/{kind}/expected.safetensors")
    base = AutoModelForCausalLM.from_pretrained(f"{root}/base")
    models = {"lora": PeftModel.from_pretrained(base, f"{root}/{kind}/lora")}
    models["merged"] = AutoModelForCausalLM.from_pretrained(f"{root}/{kind}/merged")
    for name, model in models.items():
        with torch.no_grad():
            found[f"{kind} {name}"] = float((model(expected["ids"]).logits - expected["logits"]).abs().max())
assert not [name for name in sys.modules if name.startswith("hf_delta")]
print(json.dumps(found))
"""


def model_of(kind, model=None, **changes):
    if kind not in PEFT_KINDS:
        return adapted(kind, model, **changes).eval()
    cls, fields = PEFT_KINDS[kind]
    config = cls(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields, **changes})
    return perturb_all(get_peft_model(base_model() if model is None else model, config))


def perturb_all(model):
    """PEFT names some of its weights without the name of the adapter in the middle."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def changes_of(model):
    """Brute force: what each adapted layer adds to its weight, from its outputs for the unit vectors, in float64."""
    model = model.double()
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer"):
            units = torch.eye(module.get_base_layer().weight.shape[1], dtype=torch.float64)
            with torch.no_grad():
                found[name] = (module(units) - module.base_layer(units)).T
    return found


def products(export):
    """`B A` of every module of an export, in float64."""
    state = {name.removeprefix("base_model.model."): t.double() for name, t in export.state_dict.items()}
    names = {name.rpartition(".lora_A")[0] for name in state if ".lora_A" in name}
    return {name: state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in names}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Every kind written both ways and loaded without hf_delta; the largest differences of logits, by kind and format."""
    root = tmp_path_factory.mktemp("export")
    base_model().save_pretrained(root / "base", max_shard_size="20KB")
    moved = {}
    for kind in KINDS:
        model = model_of(kind)
        model.save_pretrained(root / kind / "adapter")
        # Beyond the smaller side of every layer a truncation leaves nothing out.
        rank = 64 if kind in TRUNCATED else None
        export_lora(root / kind / "adapter", base=root / "base", rank=rank).save(root / kind / "lora")
        export_merged(root / kind / "adapter", root / kind / "merged", base=root / "base")
        save_file({"ids": IDS, "logits": logits(model)}, root / kind / "expected.safetensors")
        moved[kind] = float((logits(model) - logits(base_model())).abs().max())
    command = [sys.executable, "-c", COMPARE, str(root), *KINDS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1]), moved


@pytest.mark.parametrize("form", ["lora", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_without_hf_delta_gives_the_same_logits(fresh, kind, form):
    differences, moved = fresh
    assert moved[kind] > 1e-3
    assert differences[f"{kind} {form}"] < 1e-5


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_called_exact_is_exact(kind):
    model = model_of(kind)
    export = to_lora(model)
    assert all(error.exact and error.frobenius == 0 for error in export.errors)
    expected = changes_of(model)
    found = products(export)
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).norm() < 1e-5 * expected[name].norm()


@pytest.mark.parametrize("kind", LOSSY)
def test_what_is_left_out_is_the_least_and_is_said(kind):
    model = model_of(kind)
    export = to_lora(model, rank=8)
    expected, found = changes_of(model), products(export)
    assert {error.name for error in export.errors} == expected.keys()
    for error in export.errors:
        values = torch.linalg.svdvals(expected[error.name])
        residual = torch.linalg.svdvals(expected[error.name] - found[error.name])
        assert not error.exact and error.rank == 8
        assert error.frobenius == pytest.approx(float(residual.norm() / values.norm()), rel=1e-3)
        assert error.frobenius == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-3)
        assert error.spectral == pytest.approx(float(residual[0] / values[0]), rel=1e-3)
    assert export.max_error == max(error.frobenius for error in export.errors) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_vllm_takes(kind, tmp_path):
    path = to_lora(model_of(kind)).save(tmp_path / "lora")
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((path / "adapter_config.json").read_text())
    rank = config["r"]
    assert config["peft_type"] == "LORA" and rank in VLLM_RANKS and config["lora_alpha"] == rank
    assert config["bias"] == "none" and config["init_lora_weights"] is True
    for field in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"):
        assert not config[field], field
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        assert name.endswith((".lora_A.weight", ".lora_B.weight")) and tensor.dtype == torch.float32
        assert tensor.shape[0 if "lora_A" in name else 1] == rank


@pytest.mark.parametrize("asked,written,kept", [(None, 16, 11), (3, 8, 8), (8, 8, 8), (12, 16, 11), (65, 128, 11)])
def test_ranks_are_rounded_up_and_filled_with_zeros(asked, written, kept):
    model = model_of("lora")
    export = to_lora(model, rank=asked)
    assert export.config.r == written
    a = export.state_dict["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert a.shape[0] == written and int(a.any(1).sum()) == kept
    # Only the modules of rank 11 lose something at rank 8.
    assert {e.name.rpartition(".")[2] for e in export.errors if not e.exact} == ({"q_proj"} if written == 8 else set())
    expected = changes_of(model)
    for error in export.errors:
        values = torch.linalg.svdvals(expected[error.name])
        assert error.frobenius == pytest.approx(float(values[written:].norm() / values.norm()), abs=1e-6)


@pytest.mark.parametrize("kind", ["dora", "edora"])
def test_dora_is_written_exactly_where_it_is_asked_for(kind, tmp_path):
    model = model_of(kind)
    export = to_lora(model, dora=True)
    assert export.config.use_dora and all(error.exact for error in export.errors)
    export.save(tmp_path / "dora")
    assert torch.allclose(logits(PeftModel.from_pretrained(base_model(), tmp_path / "dora")), logits(model), atol=1e-5)
    assert to_lora(model).exact_as_dora and not to_lora(model_of("lora")).exact_as_dora
    with pytest.raises(InputError, match="q_proj: this is no DoRA"):
        to_lora(model_of("lora"), dora=True)


@pytest.mark.parametrize("kind", ["bone", "edora", "pmss", "dora", "lora"])
def test_the_model_is_left_as_it_is(kind):
    model = model_of(kind)
    expected, kept = logits(model), {n: (p, p.clone()) for n, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    to_lora(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p is kept[n][0] and torch.equal(p, kept[n][1]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["bone", "edora", "pmss", "dora", "lora", "miss_bat"])
def test_a_saved_adapter_gives_the_same_tensors(kind, tmp_path):
    model = model_of(kind)
    base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    memory, disk = to_lora(model), export_lora(tmp_path / "adapter", base=tmp_path / "base")
    assert memory.state_dict.keys() == disk.state_dict.keys()
    for name, tensor in memory.state_dict.items():
        assert torch.allclose(tensor, disk.state_dict[name], atol=1e-5), name
    assert memory.config.target_modules == disk.config.target_modules


def test_one_adapter_of_several_is_written(tmp_path):
    model = model_of("bone")
    model.add_adapter("other", life.config_of("bone", r=4, target_modules=["v_proj"]))
    perturb(model, seed=7, adapter="other")
    model.set_adapter("other")
    expected = logits(model)
    model.set_adapter("default")
    to_lora(model, "other").save(tmp_path / "lora")
    assert torch.allclose(logits(PeftModel.from_pretrained(base_model(), tmp_path / "lora")), expected, atol=1e-5)
    with pytest.raises(InputError, match="no adapter 'third'; it has default, other"):
        to_lora(model, "third")


def test_only_the_adapted_modules_are_targets(tmp_path):
    model = adapted("bone", target_modules=["q_proj"], layers_to_transform=[1]).eval()
    export = to_lora(model)
    assert export.config.target_modules == {"model.layers.1.self_attn.q_proj"}
    export.save(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "lora")
    assert [n for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")] == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_names_that_are_ends_of_others_become_an_expression():
    inner = nn.ModuleDict({"head": nn.Linear(4, 4)})
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "inner": inner})
    adapted_model = get_peft_model(model, LoraConfig(r=2, target_modules="head"))
    assert [n for n, m in adapted_model.get_base_model().named_modules() if hasattr(m, "lora_A")] == ["head"]
    assert to_lora(adapted_model).config.target_modules == "head"


@pytest.mark.parametrize("kind", ["pmss", "bone", "edora"])
def test_transposed_layers(kind, tmp_path):
    model = adapted(kind, gpt2_model(), target_modules=["c_attn", "c_proj"]).eval()
    to_lora(model, rank=64).save(tmp_path / "lora")
    assert torch.allclose(logits(PeftModel.from_pretrained(gpt2_model(), tmp_path / "lora")), logits(model), atol=1e-5)


def test_embeddings(tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = perturb_all(get_peft_model(base_model(), config))
    to_lora(model).save(tmp_path / "lora")
    assert torch.allclose(logits(PeftModel.from_pretrained(base_model(), tmp_path / "lora")), logits(model), atol=1e-6)


def test_rounding_to_a_smaller_dtype_is_part_of_the_error():
    export = to_lora(model_of("bone"), dtype=torch.bfloat16)
    assert {t.dtype for t in export.state_dict.values()} == {torch.bfloat16}
    assert all(not error.exact and 1e-5 < error.frobenius < 1e-2 for error in export.errors)


def test_seams_of_transformers():
    for name, parameters in SEAMS.items():
        function = getattr(conversion_mapping, name, None) or getattr(core_model_loading, name)
        assert tuple(inspect.signature(function).parameters) == parameters
