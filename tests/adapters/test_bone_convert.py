"""Adapters of PEFT's MiSS and of its former Bone: to ours and back, loaded as they are, and refused."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import MissConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_delta import BoneConfig, InputError
from hf_delta.adapters.bone import convert, convert_to_bone, convert_to_miss, formats
from tests.adapters.life import adapted, base_model, layers, logits


TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# `init_weights` of PEFT, and our mode.
INIT_WEIGHTS = {"bone": True, "mini": "mini", "bat_col": "bat"}

every_miss = pytest.mark.parametrize("mode", INIT_WEIGHTS)


def miss(folder, mode="bone", **fields):
    """A MiSS adapter away from its start, saved by PEFT; returns its logits."""
    fields = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "mini_r": 4, **fields}
    model = get_peft_model(base_model(), MissConfig(init_weights=INIT_WEIGHTS[mode], **fields)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return logits(model)


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS)


def former_bone(folder, mode="bone", **fields):
    """The same as PEFT 0.14 to 0.18 wrote it for its Bone, which had neither `mini` nor dropout."""
    expected = miss(folder, mode, **fields)
    kept = json.loads((folder / CONFIG).read_text())
    kept = {name: value for name, value in kept.items() if name not in ("mini_r", "miss_dropout", "peft_version")}
    (folder / CONFIG).write_text(json.dumps({**kept, "peft_type": "BONE"}))
    rewrite(folder, lambda tensors: {name.replace(".miss_", ".bone_"): t for name, t in tensors.items()})
    return expected


def loaded(folder, **kwargs):
    return PeftModel.from_pretrained(base_model(), folder, **kwargs).eval()


def same_tensors(one, other):
    one, other = load_file(one / TENSORS), load_file(other / TENSORS)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fields_of(folder):
    fields = json.loads((folder / CONFIG).read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


# -- both ways ------------------------------------------------------------------------------------------------------
@every_miss
def test_miss_to_ours_and_back_bit_for_bit(tmp_path, mode):
    # PEFT's own mini takes no mini_r from other modes, which have its default.
    fields = {"mini_r": 4 if mode == "mini" else 1, "modules_to_save": ["norm"], "layers_to_transform": [1]}
    expected = miss(tmp_path / "miss", mode, miss_dropout=0.1, target_modules=["q_proj", "down_proj"], **fields)
    assert convert_to_bone(tmp_path / "miss", tmp_path / "ours") == tmp_path / "ours"
    ours = loaded(tmp_path / "ours")
    assert ours.peft_config["default"].mode == mode and len(layers(ours)) == 2
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    assert convert_to_miss(tmp_path / "ours", tmp_path / "back") == tmp_path / "back"
    assert same_tensors(tmp_path / "back", tmp_path / "miss")
    assert fields_of(tmp_path / "back") == fields_of(tmp_path / "miss")
    assert torch.equal(logits(loaded(tmp_path / "back")), expected)


@every_miss
def test_ours_to_miss_and_back_bit_for_bit(tmp_path, mode):
    model = adapted(mode, dropout=0.1, exclude_modules=["k_proj"], bias="hfd_bone_only").eval()
    model.save_pretrained(tmp_path / "ours")
    convert_to_miss(tmp_path / "ours", tmp_path / "miss")
    theirs = loaded(tmp_path / "miss")
    config = theirs.peft_config["default"]
    assert isinstance(config, MissConfig) and (config.bias, config.miss_dropout) == ("MiSS_only", 0.1)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    convert_to_bone(tmp_path / "miss", tmp_path / "back")
    assert same_tensors(tmp_path / "back", tmp_path / "ours")
    assert fields_of(tmp_path / "back") == fields_of(tmp_path / "ours")
    assert torch.equal(logits(loaded(tmp_path / "back")), logits(model))


def test_random_starts_of_miss_are_values_like_others(tmp_path):
    expected = miss(tmp_path / "miss")
    edit(tmp_path / "miss", init_weights=False)
    convert_to_bone(tmp_path / "miss", tmp_path / "ours")
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), expected, atol=1e-5, rtol=1e-5)


def test_an_empty_directory_is_filled_and_parents_are_made(tmp_path):
    miss(tmp_path / "miss")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        convert_to_bone(str(tmp_path / "miss"), str(out))
        assert sorted(path.name for path in out.iterdir()) == [CONFIG, TENSORS]
        assert list(out.parent.glob(".*")) == [] and out.stat().st_mode == (tmp_path / "miss").stat().st_mode


# -- PEFT's former Bone ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["bone", "bat_col"])
def test_former_bone_through_conversion(tmp_path, mode):
    expected = former_bone(tmp_path / "old", mode)
    convert_to_bone(tmp_path / "old", tmp_path / "ours")
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), expected, atol=1e-5, rtol=1e-5)
    convert_to_miss(tmp_path / "old", tmp_path / "miss")
    assert torch.equal(logits(loaded(tmp_path / "miss")), expected)


@pytest.mark.parametrize("mode", ["bone", "bat_col"])
@pytest.mark.parametrize("kwargs", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_former_bone_as_it_is(tmp_path, mode, kwargs):
    expected = former_bone(tmp_path / "old", mode, modules_to_save=["norm"])
    model = loaded(tmp_path / "old", **kwargs)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    config = model.peft_config["default"]
    assert type(config) is BoneConfig and (config.mode, config.peft_type) == (mode, "HFD_BONE")
    model.save_pretrained(tmp_path / "new")
    convert_to_bone(tmp_path / "old", tmp_path / "converted")
    assert same_tensors(tmp_path / "new", tmp_path / "converted")
    # A reference adapter is made from the configuration of the policy's, and has nothing to read.
    model.add_adapter("ref", config)
    model.set_adapter("ref")
    assert torch.equal(logits(model), logits(base_model()))
    model.load_adapter(tmp_path / "old", "again")
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_former_bone_is_not_used_without_its_values(tmp_path):
    former_bone(tmp_path / "old")
    model = base_model()
    # transformers reads the tensors by names of its own, finds none and warns.
    model.load_adapter(str(tmp_path / "old"))
    with pytest.raises(InputError, match=r"q_proj, adapter 'default' was saved by the Bone of PEFT .*convert_to_bone"):
        logits(model)


def test_former_bone_stays_with_a_peft_that_has_it(monkeypatch):
    assert PeftConfig.from_peft_type(peft_type="BONE", r=4).mode == "bone"
    known = {}
    monkeypatch.setattr(formats, "PEFT_TYPE_TO_CONFIG_MAPPING", known)
    monkeypatch.setattr(formats, "PeftType", SimpleNamespace(__members__={"BONE": "BONE"}))
    formats.register_old_bone()
    assert known == {}
    monkeypatch.setattr(formats, "PeftType", SimpleNamespace(__members__={}))
    formats.register_old_bone()
    assert known == {"BONE": formats.OldBoneConfig}
    known["BONE"] = MissConfig
    formats.register_old_bone()
    assert known == {"BONE": MissConfig}


# -- refused --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["row", "bat_row"])
def test_modes_that_miss_does_not_have(tmp_path, mode):
    adapted(mode).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=f"mode: {mode} has no form in PEFT's MiSS, .* hf-delta export"):
        convert_to_miss(tmp_path / "ours", tmp_path / "miss")
    assert not (tmp_path / "miss").exists()


@pytest.mark.parametrize("converted", [convert_to_bone, convert_to_miss])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_not_overwritten(tmp_path, converted, kind):
    former_bone(tmp_path / "old")
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    there = out / "notes.txt" if kind == "folder" else out
    there.write_text("mine")
    with pytest.raises(InputError, match="out: is there already; name a new directory"):
        converted(tmp_path / "old", out)
    assert there.read_text() == "mine" and len([*tmp_path.rglob("*")]) == len([*(tmp_path / "old").rglob("*")]) + (
        3 if kind == "folder" else 2
    )


def _pickle(folder):
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def _with_nan(tensors):
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = float("nan")
    return tensors


BROKEN = [
    (_pickle, r"adapter_model\.bin: is a pickle file, .* weights_only=True"),
    (lambda folder: (folder / TENSORS).unlink(), r"adapter_model\.safetensors: cannot be read"),
    (lambda folder: (folder / TENSORS).write_bytes(b"\x08" * 20), r"adapter_model\.safetensors: cannot be read"),
    (lambda folder: (folder / CONFIG).unlink(), r"adapter_config\.json: cannot be read as the configuration"),
    (lambda folder: (folder / CONFIG).write_text("{"), r"adapter_config\.json: cannot be read as the configuration"),
    (lambda folder: (folder / CONFIG).write_text("[]"), r"adapter_config\.json: peft_type is None"),
    (lambda folder: edit(folder, peft_type="LORA"), r"adapter_config\.json: peft_type is 'LORA'.* BONE and MISS"),
    (lambda folder: rewrite(folder, _with_nan), r"down_proj\.bone_block holds NaN or infinite values"),
    (lambda folder: edit(folder, init_weights="col"), r"adapter_config\.json: init_weights is 'col', which no Bone"),
    (lambda folder: edit(folder, init_weights=[True]), r"adapter_config\.json: init_weights is \[True\]"),
    (lambda folder: edit(folder, r=0), r"adapter_config\.json: r is 0"),
    (lambda folder: edit(folder, bias=3), r"adapter_config\.json: bias is 3"),
    (
        lambda folder: edit(folder, r=4),
        r"_proj\.bone_block has the shape \(8, \d+\), .* mode bone, which is \(4, any\)",
    ),
    (lambda folder: edit(folder, init_weights="bat"), r"mode bat_col, which is \(any, 8, 8\): the two files do not"),
    (lambda folder: edit(folder, peft_type="MISS"), r"has no tensor whose name ends in \.miss_block"),
]


@pytest.mark.parametrize("broken, said", BROKEN, ids=[said for _, said in BROKEN])
def test_broken_directories_are_refused_and_nothing_is_left(tmp_path, broken, said):
    former_bone(tmp_path / "old", layers_to_transform=[0], target_modules=["q_proj", "down_proj"])
    broken(tmp_path / "old")
    with pytest.raises(InputError, match=said) as refusal:
        convert_to_bone(tmp_path / "old", tmp_path / "ours")
    assert str(refusal.value).startswith(str(tmp_path / "old"))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_nothing_is_left_of_a_directory_that_could_not_be_written(tmp_path, monkeypatch):
    former_bone(tmp_path / "old")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        convert_to_bone(tmp_path / "old", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_fields_that_are_left_out_are_named(tmp_path, caplog):
    former_bone(tmp_path / "old")
    with caplog.at_level(logging.WARNING, logger="hf_delta"):
        convert_to_bone(tmp_path / "old", tmp_path / "first")
        assert caplog.messages == []
        edit(tmp_path / "old", alpha=3, notes=None)
        convert_to_bone(tmp_path / "old", tmp_path / "second")
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("were left out: alpha")
