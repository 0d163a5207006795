"""The private names of TRL that `_compat` uses, against the TRL that is installed."""

import ast
import importlib
import inspect
import subprocess
import sys
import textwrap

import peft
import pytest
import trl
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import Trainer
from trl.generation import vllm_generation
from trl.trainer import dpo_trainer, grpo_trainer

from hf_delta._compat import hub_pushes, running, safe_saves, trl_dpo, trl_state, trl_vllm, whole_saves
from hf_delta._compat import peft as peft_compat
from hf_delta._compat import transformers as transformers_compat
from hf_delta._compat import trl as compat
from hf_delta._compat.imports import when_imported
from hf_delta._compat.safe_saves import SafeSaves
from hf_delta._compat.trl_state import ExtraState


@pytest.mark.parametrize("name", compat.SEAMS)
def test_signatures_are_the_recorded_ones(name):
    parameters = tuple(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)
    assert parameters == compat.SEAMS[name], f"TRL changed GRPOTrainer.{name}: see hf_delta/_compat/trl.py"


def test_every_private_override_is_recorded():
    functions = {n for n, f in vars(compat.GRPOHooks).items() if inspect.isfunction(f)}
    overridden = {n for n in functions if n.startswith("_") and not n.startswith("__")}
    assert overridden <= compat.SEAMS.keys()


@pytest.mark.parametrize("name", compat.ATTRIBUTES)
def test_attributes_are_set_in_the_constructor(name):
    assert f"self.{name} = " in inspect.getsource(trl.GRPOTrainer.__init__)


def test_loss_types_are_the_ones_that_the_loss_compares_with():
    tree = ast.parse(textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._compute_loss)))
    compared = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "self.loss_type":
            compared |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
    assert compared == set(compat.GRPO_LOSS_TYPES)


@pytest.mark.parametrize("name", trl_vllm.SEAMS)
def test_signatures_of_generation_with_vllm_are_the_recorded_ones(name):
    parameters = tuple(inspect.signature(getattr(vllm_generation.VLLMGeneration, name)).parameters)
    assert parameters == trl_vllm.SEAMS[name]
    # TRL sends what the replaced one yields and reads no parameters beside it, and gives its engine this one keyword.
    sync = inspect.getsource(vllm_generation.VLLMGeneration.sync_weights)
    assert sync.count(f"self.{name}()") == 4 and "named_parameters" not in sync
    assert "quantization=quantization" in inspect.getsource(vllm_generation.VLLMGeneration._init_vllm)


def test_rollouts_carry_what_the_trainer_reads():
    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    for key in ("completion_mask", "tool_mask", "advantages", "num_items_in_batch", "old_per_token_logps"):
        assert f'"{key}"' in source


# -- DPO ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", trl_dpo.SEAMS)
def test_signatures_of_dpo_are_the_recorded_ones(name):
    parameters = tuple(inspect.signature(getattr(trl.DPOTrainer, name)).parameters)
    assert parameters == trl_dpo.SEAMS[name], f"TRL changed DPOTrainer.{name}: see hf_delta/_compat/trl_dpo.py"


def test_every_private_override_of_dpo_is_recorded():
    functions = {n for n, f in vars(trl_dpo.DPOHooks).items() if inspect.isfunction(f)}
    overridden = {n for n in functions if n.startswith("_") and hasattr(trl.DPOTrainer, n)}
    assert overridden - {"__init__"} == trl_dpo.SEAMS.keys()


@pytest.mark.parametrize("owner", [trl.GRPOTrainer, trl.DPOTrainer, trl.SFTTrainer])
@pytest.mark.parametrize(("mixin", "seams"), [(ExtraState, trl_state.SEAMS), (SafeSaves, safe_saves.SEAMS)])
def test_signatures_of_checkpoints_are_the_recorded_ones(owner, mixin, seams):
    overridden = {n for n in vars(mixin) if n.startswith("_") and not n.startswith("__")}
    assert overridden and overridden <= seams.keys()
    for name in seams:
        assert tuple(inspect.signature(getattr(owner, name)).parameters) == seams[name]


def test_a_checkpoint_is_complete_with_the_last_file_that_the_first_process_writes():
    """After the random states, in which all wait for each other; what is deleted is deleted after it."""
    source = inspect.getsource(Trainer._save_checkpoint)
    places = [
        source.index(t) for t in ("_save_rng_state(", "save_to_json(", "_push_from_checkpoint(", "rotate_checkpoints(")
    ]
    assert places == sorted(places)


def test_what_is_summed_up_is_set_to_zero_before_training_begins():
    source = inspect.getsource(Trainer)
    zero = [source.index(f"self.{name} = ") for name in running.TRAINER_ATTRIBUTES]
    assert max(zero) < source.index("callback_handler.on_train_begin(")
    for owner in (trl.SFTTrainer, trl.DPOTrainer):
        for name in (*running.TRL_ATTRIBUTES, *running.COUNTING_ATTRIBUTES):
            assert f"self.{name} = " in inspect.getsource(owner.__init__)


@pytest.mark.parametrize("name", trl_dpo.ATTRIBUTES)
def test_attributes_of_dpo_are_set_in_the_constructor(name):
    assert f"self.{name} = " in inspect.getsource(trl.DPOTrainer.__init__)


def test_dpo_loss_types_are_the_ones_that_the_loss_compares_with():
    tree = ast.parse(textwrap.dedent(inspect.getsource(dpo_trainer.DPOTrainer._compute_loss)))
    compared = [
        node.comparators[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "loss_type" and isinstance(node.ops[0], ast.Eq)
    ]
    assert sorted(compared) == sorted(trl_dpo.DPO_LOSS_TYPES)


def test_the_loss_of_dpo_counts_tokens_and_calls_the_head_as_ours_does():
    """What `DPOHooks.model_inputs` and `count_tokens` repeat of TRL's loss."""
    source = inspect.getsource(dpo_trainer.DPOTrainer._compute_loss)
    for line in (
        'labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)',
        "outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)",
        "self._total_train_tokens += num_tokens_in_batch // self._tp_size",
        'adapter_name="ref" if "ref" in ref_model_unwrapped.peft_config else None',
    ):
        assert line in source


def test_columns_of_dpo_are_the_ones_that_ours_are_added_to():
    source = inspect.getsource(dpo_trainer.DPOTrainer._set_signature_columns_if_needed)
    assert "self._signature_columns = [" in source


@pytest.mark.parametrize("name", transformers_compat.SEAMS)
def test_signatures_of_the_trainer_are_the_recorded_ones(name):
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters) == transformers_compat.SEAMS[name]


@pytest.mark.parametrize("name", whole_saves.SEAMS)
def test_signatures_of_saving_are_the_recorded_ones(name):
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters) == whole_saves.SEAMS[name]
    # Checkpoints and final saves go through the public one, which writes nothing of its own where weights are sharded.
    assert "self.save_model(output_dir, _internal_call=True)" in inspect.getsource(Trainer._save_checkpoint)
    assert "self.create_accelerator_and_postprocess()" in inspect.getsource(Trainer.__init__)


@pytest.mark.parametrize("name", hub_pushes.SEAMS)
def test_signatures_of_pushing_are_the_recorded_ones(name):
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters) == hub_pushes.SEAMS[name]
    source = inspect.getsource(Trainer)
    for called in (
        "self.init_hf_repo()",
        "self._push_from_checkpoint(output_dir)",
        "self.push_to_hub(commit_message=",
    ):
        assert called in source
    # Who else uploads would upload more.
    uploaders = (Trainer.push_to_hub, Trainer._push_from_checkpoint)
    assert source.count("upload_folder(") == sum(inspect.getsource(one).count("upload_folder(") for one in uploaders)


@pytest.mark.parametrize("name", compat.SAMPLER_ATTRIBUTES)
def test_the_sampler_has_what_resuming_needs(name):
    assert f"self.{name} = " in inspect.getsource(compat.RepeatSampler.__init__)
    assert "torch.randperm(self.num_samples, generator=self.generator)" in inspect.getsource(
        compat.RepeatSampler.__iter__
    )


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0.dev0", "1.17.0", "2.0.0"])
def test_another_trl_is_refused_with_what_to_install(version):
    with pytest.raises(ImportError, match=r"pip install 'trl(<1.17,>=1.16|>=1.16,<1.17)'"):
        compat.require_supported_trl(version)


def test_the_installed_trl_is_accepted_and_patch_releases_are():
    compat.require_supported_trl()
    compat.require_supported_trl("1.16.9")


def test_a_wrong_trl_fails_at_import_of_the_trainer():
    code = (
        "import importlib.metadata as m; real = m.version;"
        "m.version = lambda n: '1.15.2' if n == 'trl' else real(n);"
        "from hf_delta import DeltaGRPOTrainer"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert (
        "ImportError: hf_delta uses private methods of TRL" in run.stderr and "trl 1.15.2 is installed" in run.stderr
    )


@pytest.mark.parametrize(
    "owner,name",
    [*((BaseTuner, n) for n in peft_compat.TUNER_SEAMS), *((BaseTunerLayer, n) for n in peft_compat.LAYER_SEAMS)],
)
def test_signatures_of_peft_are_the_recorded_ones(owner, name):
    recorded = {**peft_compat.TUNER_SEAMS, **peft_compat.LAYER_SEAMS}[name]
    assert tuple(inspect.signature(getattr(owner, name)).parameters) == recorded, "see hf_delta/_compat/peft.py"


def test_peft_asks_its_tuner_for_the_hook_of_mixed_batches():
    assert "_enable_peft_forward_hooks" in inspect.getsource(peft.PeftModel._enable_peft_forward_hooks)


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0.dev0", "0.22.0", "1.0.0"])
def test_another_peft_is_refused_with_what_to_install(version):
    with pytest.raises(ImportError, match=r"pip install 'peft(<0.22,>=0.21|>=0.21,<0.22)'"):
        peft_compat.require_supported_peft(version)


def test_peft_stays_usable_where_its_version_is_not_supported():
    code = (
        "import importlib.metadata as m; real = m.version;"
        "m.version = lambda name: '0.30.0' if name == 'peft' else real(name);"
        "import hf_delta, peft; print(peft.LoraConfig(r=4).r)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "4" and "pip install 'peft" in found.stderr


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("import hf_delta; import peft", marks=pytest.mark.slow),
        "import peft; import hf_delta",
        # What `is_peft_available` of transformers does.
        "import hf_delta, importlib.util as u; assert u.find_spec('peft').loader.get_code('peft'); import peft",
    ],
)
def test_adapters_are_known_to_peft_whatever_is_imported_first(order):
    code = f"{order}; print(sorted(k for k in peft.PEFT_TYPE_TO_CONFIG_MAPPING if k.startswith('HFD_')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert [name in found.stdout for name in ("HFD_BONE", "HFD_EDORA", "HFD_PMSS")] == [True] * 3, found.stderr


def test_the_watch_for_an_import_outlives_a_failed_one_and_calls_once(tmp_path, monkeypatch):
    name, calls, finders = "a_package_that_fails_once", [], list(sys.meta_path)
    (tmp_path / f"{name}.py").write_text("raise ImportError('the first time')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    when_imported(name, lambda: calls.append(name))
    with pytest.raises(ImportError, match="the first time"):
        importlib.import_module(name)
    assert not calls
    (tmp_path / f"{name}.py").write_text("value = 1")
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    assert module.value == 1 and calls == [name] and sys.meta_path == finders
    importlib.reload(module)
    assert calls == [name]
