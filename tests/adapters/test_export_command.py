"""`hf-delta export`: what it prints before it writes, and how it refuses."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, MissConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_delta import InputError, to_lora
from hf_delta.adapters.export import LoraExport, export_lora
from hf_delta.cli import main
from tests.adapters.life import adapted, base_model, logits


LORA = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def folder(tmp_path):
    """A base model, and an EDoRA adapter that names it."""
    base_model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted("edora", model).save_pretrained(tmp_path / "adapter")
    return tmp_path


def export(folder, form="lora", *flags, adapter="adapter", out="out"):
    return main(["export", "--adapter", str(folder / adapter), "--format", form, "--out", str(folder / out), *flags])


def refused(folder, capsys, said, form="lora", *flags, **paths):
    """The command ends with status 2 and one line, and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    assert export(folder, form, *flags, **paths) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error, error
    assert sorted(folder.rglob("*")) == before


def save(folder, config, name="adapter", **options):
    shutil.rmtree(folder / name, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, config).save_pretrained(folder / name, **options)


def edit(path, **fields):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **fields}))


def test_both_forms_from_the_command_line(folder, capsys):
    assert export(folder, "lora", "--rank", "64", out="lora") == 0
    assert "--max-lora-rank 64" in capsys.readouterr().out
    assert export(folder, "merged", out="merged") == 0
    expected = logits(PeftModel.from_pretrained(base_model(), folder / "adapter"))
    assert torch.allclose(logits(PeftModel.from_pretrained(base_model(), folder / "lora")), expected, atol=1e-5)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder / "merged")), expected, atol=1e-5)


def test_the_error_of_every_module_is_printed_before_anything_is_written(folder, capsys, monkeypatch):
    printed = []
    monkeypatch.setattr(LoraExport, "save", lambda self, out: printed.append(capsys.readouterr().out))
    export(folder)
    assert not (folder / "out").exists()
    lines = printed[0].splitlines()
    errors = export_lora(folder / "adapter").errors
    for error in errors:
        assert any(error.name in line and f"{error.frobenius:.2e}" in line for line in lines)
    assert len(errors) == 14 and "--dora" in lines[-1] and "merged is exact" in lines[-1]


def test_an_error_above_the_limit_is_refused(folder, capsys):
    refused(folder, capsys, "leaves out more than 0.001", "lora", "--max-error", "1e-3")
    refused(folder, capsys, "max_error is -1.0: write a number from 0 up", "lora", "--max-error", "-1")
    worst = export_lora(folder / "adapter").max_error
    assert export(folder, "lora", "--max-error", str(worst * 1.01)) == 0
    with pytest.raises(InputError, match="leaves out more"):
        to_lora(PeftModel.from_pretrained(base_model(), folder / "adapter"), max_error=worst * 0.99)


def test_dora_and_dtypes(folder, capsys):
    assert export(folder, "lora", "--dora", "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "vLLM takes no DoRA" in said
    assert {t.dtype for t in load_file(folder / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("flags", [["--rank", "8"], ["--max-error", "0.1"], ["--dora"]])
def test_options_of_the_other_form(folder, capsys, flags):
    refused(folder, capsys, f"{flags[0]} goes with --format lora", "merged", *flags)


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_directories(folder, capsys, form):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    refused(folder, capsys, "out is not empty", form)
    (folder / "file").write_text("mine")
    refused(folder, capsys, "is no directory that you may write to", form, out="file")
    refused(folder, capsys, "nothing is no directory", form, adapter="nothing", out="new")
    refused(folder, capsys, "holds no adapter_config.json", form, adapter="base", out="new")
    refused(folder, capsys, "there is no directory", form, "--base", str(folder / "nothing"), out="new")
    refused(folder, capsys, "holds no config.json", form, "--base", str(folder / "adapter"), out="new")
    edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    refused(folder, capsys, "name it with --base", form, out="new")


def test_unknown_formats(folder, capsys):
    refused(folder, capsys, "choose from", "gguf")


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_broken_and_pickled_weights(folder, capsys, form):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    broken = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
    save_file(broken, path)
    refused(folder, capsys, f"{name} holds NaN", form)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    refused(folder, capsys, "was made for another base model", form)
    save_file({**tensors, "base_model.model.model.layers.9.x": torch.ones(1)}, path)
    refused(folder, capsys, "no place for", form)
    path.write_bytes(path.read_bytes()[:-8])
    refused(folder, capsys, "cut short or damaged", form)
    path.rename(folder / "adapter" / "adapter_model.bin")
    refused(folder, capsys, "pickled weights, which are not read", form)


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_another_base_model(folder, capsys, form):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=24, pad_token_id=0)).save_pretrained(folder / "other")
    refused(folder, capsys, "size mismatch for", form, "--base", str(folder / "other"))
    shutil.copytree(folder / "base", folder / "nan")
    path = next(p for p in (folder / "nan").glob("*.safetensors") if any("q_proj.weight" in k for k in load_file(p)))
    tensors = load_file(path)
    tensors = {key: t * float("nan") if "q_proj.weight" in key else t for key, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    save(folder, LoraConfig(**LORA, use_dora=True))
    refused(folder, capsys, "NaN or infinite", form, "--base", str(folder / "nan"))


def test_base_models_that_cannot_be_read(folder, capsys):
    edit(folder / "base" / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, capsys, "quantised with gptq", "merged")
    edit(folder / "base" / "config.json", quantization_config=None, model_type="mine", architectures=["Mine"])
    refused(folder, capsys, "no model that transformers can build", "merged")
    edit(folder / "base" / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    next((folder / "base").glob("*-00002-*")).unlink()
    refused(folder, capsys, "missing or cut short", "merged")
    for path in (folder / "base").glob("*.safetensors*"):
        path.unlink()
    refused(folder, capsys, "Pickled weights are not read", "merged")


@pytest.mark.parametrize(
    "config,said",
    [
        (LoraConfig(**LORA, modules_to_save=["lm_head"]), "modules_to_save: ['lm_head'] cannot be part"),
        (LoraConfig(**LORA, bias="all"), "bias: 'all' cannot be part"),
        (LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, lora_bias=True), "lora_bias: True cannot be part"),
        (LoraConfig(**LORA, trainable_token_indices=[1, 2]), "trainable_token_indices: [1, 2] cannot be part"),
        (LoraConfig(**LORA, r=600), "rank 600 is above 512"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "say which rank"),
    ],
)
def test_what_no_lora_for_vllm_can_hold(folder, capsys, config, said):
    save(folder, config)
    refused(folder, capsys, said, "lora")


@pytest.mark.parametrize("form", ["lora", "merged"])
@pytest.mark.parametrize(
    "config,said",
    [
        (LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights: pissa has changed the base weights"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "changes no weights"),
    ],
)
def test_what_is_no_change_of_the_weights(folder, capsys, form, config, said):
    save(folder, config)
    refused(folder, capsys, said, form)


@pytest.mark.parametrize("rank", ["0", "-3", "513"])
def test_ranks(folder, capsys, rank):
    refused(folder, capsys, "rank", "lora", "--rank", rank)


def test_quantisation_flags(folder, capsys):
    refused(folder, capsys, "not both", "lora", "--load-in-4bit", "--load-in-8bit")
    refused(folder, capsys, "go with --load-in-4bit", "lora", "--use-bnb-nested-quant")


def test_tokens_that_were_trained_are_not_merged_silently(folder, capsys):
    save(folder, LoraConfig(**LORA, trainable_token_indices=[1, 2]))
    refused(folder, capsys, "call merge_and_unload", "merged")


def test_a_method_that_neither_package_knows(folder, capsys):
    edit(folder / "adapter" / "adapter_config.json", peft_type="NEW_METHOD")
    refused(folder, capsys, "knows the method 'NEW_METHOD'", "merged")


def test_adapters_of_the_former_bone(folder):
    model = adapted_miss(folder / "base")
    model.save_pretrained(folder / "old")
    path = folder / "old" / "adapter_model.safetensors"
    save_file({name.replace("miss_block", "bone_block"): t for name, t in load_file(path).items()}, path)
    edit(folder / "old" / "adapter_config.json", peft_type="BONE")
    for form in ("lora", "merged"):
        assert export(folder, form, "--base", str(folder / "base"), adapter="old", out=form) == 0
    for result in (
        PeftModel.from_pretrained(base_model(), folder / "lora"),
        AutoModelForCausalLM.from_pretrained(folder / "merged"),
    ):
        assert torch.allclose(logits(result), logits(model), atol=1e-5)


def adapted_miss(base):
    config = MissConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model


def test_merged_adapters_in_memory():
    model = get_peft_model(base_model(), LoraConfig(**LORA, use_dora=True))
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter first"):
        to_lora(model)
    with pytest.raises(InputError, match="has no adapter 'default'; it has none"):
        to_lora(base_model())
