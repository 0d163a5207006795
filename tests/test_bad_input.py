"""Bad input that depends on what is installed. All other bad input is in the table of `tests/bad_inputs`."""

import importlib.metadata
import importlib.util

import pytest

import hf_delta.train
from tests.running import LORA, keys, write


FIND_SPEC, VERSION = importlib.util.find_spec, importlib.metadata.version


def refusal(folder, content, capsys):
    """The one line that the command says; nothing but the recipe is in the directory then."""
    capsys.readouterr()
    assert hf_delta.train.main([str(write(folder, content))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_vllm": True}, "vllm is not installed: pip install -c constraints-vllm.txt 'hf_delta[vllm]'"),
        (
            {"load_in_4bit": True, "peft_config": LORA},
            "bitsandbytes is not installed: pip install 'hf_delta[quantization]'",
        ),
        ({"use_liger_kernel": True}, "liger_kernel is not installed: pip install liger-kernel, or leave"),
    ],
)
def test_a_package_that_is_not_installed(tmp_path, playground, capsys, monkeypatch, changes, said):
    absent = ("vllm", "bitsandbytes", "liger_kernel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else FIND_SPEC(name, *a))
    assert said in refusal(tmp_path, keys("grpo", playground, tmp_path / "out", **changes), capsys)


def test_a_vllm_that_trl_does_not_support(tmp_path, playground, capsys, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name == "vllm" else FIND_SPEC(name, *a)
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.0" if name == "vllm" else VERSION(name))
    said = refusal(tmp_path, keys("grpo", playground, tmp_path / "out", use_vllm=True), capsys)
    assert "vllm 0.33.0 is installed, and TRL 1.16 supports 0.22.0 to 0.31.0: pip install -c constraints-vllm" in said
