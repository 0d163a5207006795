"""Rollouts through vLLM: what the engine is asked, which weights it holds, and what the trainer makes of its answers."""

import importlib.metadata
import inspect
import re
from collections import Counter, defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from zlib import crc32

import peft
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import import_utils
from trl.generation import vllm_generation

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer, InputError
from hf_delta._compat.bitsandbytes import dequantised_weight
from hf_delta._compat.trl_vllm import dense_engine
from hf_delta._compat.vllm import SUPPORTED_VLLM, vllm_mismatch
from hf_delta.adapters.dora import fast_dora
from hf_delta.rl.allocation import RolloutGDRO
from tests.adapters.life import DORA, KINDS, config_of
from tests.rl.engine import Syncs, assert_exact, assert_ratio_is_one, built, engine_of, logged
from tests.rl.frozen import GENERATIONS, PROMPTS, build_world
from tests.rl.merged import METHODS
from tests.rl.test_trainer import lora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


# -- the engine under TRL's own trainer -----------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"vllm_enable_sleep_mode": True}, {"vllm_mode": "server"}], ids=str)
def test_trls_own_trainer_trains_and_its_importance_ratio_is_one(world, tmp_path, changes):
    with built(world, tmp_path, trl.GRPOTrainer, trl.GRPOConfig, max_steps=3, **changes) as trainer:
        trainer.train()
    assert_ratio_is_one(trainer)
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    calls = engine_of(trainer).calls
    assert [call.syncs for call in calls] == [1, 2, 3]
    # A server is asked once for each prompt, and the colocated engine for each row.
    per_request = GENERATIONS if "vllm_mode" in changes else 1
    assert {(call.params.n, len(call.prompts)) for call in calls} == {
        (per_request, PROMPTS * GENERATIONS // per_request)
    }
    start = AutoModelForCausalLM.from_pretrained(world).state_dict()
    assert not any(torch.equal(weight, start[name]) for name, weight in trainer.model.named_parameters())


def test_without_synchronisation_the_importance_ratio_is_not_one(world, tmp_path):
    with built(world, tmp_path, trl.GRPOTrainer, trl.GRPOConfig, max_steps=3) as trainer:
        trainer.vllm_generation.sync_weights = lambda: None
        trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) > 0.1


# -- different numbers of rollouts ----------------------------------------------------------------------------------
class FromOneToTheNext:
    """An allocation that differs from prompt to prompt and from batch to batch."""

    def __init__(self):
        self.handed_out = []

    def __call__(self, batch):
        counts = torch.tensor([2, 7, 4, 3, 5, 2, 6, 3]).roll(3 * len(self.handed_out))
        self.handed_out.append(dict(zip(batch.prompt_ids, counts.tolist(), strict=True)))
        return counts


class Recorded(RolloutGDRO):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.handed_out = []

    def __call__(self, batch):
        counts = super().__call__(batch)
        self.handed_out.append(dict(zip(batch.prompt_ids, counts.tolist(), strict=True)))
        return counts


class Watched(DeltaGRPOTrainer):
    """Keeps what its rollouts became."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def on_rollouts(self, rollouts, rewards_per_func, rows):
        super().on_rollouts(rollouts, rewards_per_func, rows)
        kept = {key: rollouts[key].clone() for key in ("advantages", "completion_mask")}
        self.seen.append({"reward": rewards_per_func[:, 0].tolist(), **kept})


class Judge:
    """Right for some prompts, wrong for others, and by chance for the rest; keeps the rows as a reward function gets them."""

    __name__ = "judge"

    def __init__(self):
        self.batches = []

    def __call__(self, prompts, completions, completion_ids, prompt_id, answer, **kwargs):
        self.batches.append({"prompts": prompts, "ids": completion_ids, "prompt_id": prompt_id, "answer": answer})
        return [self.score(prompt, ids) for prompt, ids in zip(prompts, completion_ids)]

    @staticmethod
    def score(prompt, ids):
        kind = crc32(prompt.encode()) % 4
        return float(crc32(str(ids).encode()) % 2) if kind > 1 else float(kind)


MERGED = {"peft_config": lora(0.0), "learning_rate": 0.1}
RULE = f"{__name__}.FromOneToTheNext"
VARIABLE = {
    "a fixed rule": {"rollout_allocation": RULE},
    "every sample counts the same": {"rollout_allocation": RULE, "rollout_weighting": "sample"},
    "truncated": {"rollout_allocation": RULE, "mask_truncated_completions": True},
    "rollout_gdro": {"rollout_allocation": f"{__name__}.Recorded", "rows": PROMPTS + 3, "max_steps": 6},
    "server": {"rollout_allocation": RULE, "vllm_mode": "server"},
    "adapter": {"rollout_allocation": RULE, **MERGED, "vllm_enable_sleep_mode": True},
    "adapter, server": {"rollout_allocation": RULE, **MERGED, "vllm_mode": "server"},
}


@pytest.fixture(scope="module", params=VARIABLE)
def run(request, world, tmp_path_factory):
    """One run of each kind: the trainer, its engine, its judge, and the key of the kind."""
    judge = Judge()
    changes = {"max_steps": 3, **VARIABLE[request.param]}
    with built(world, tmp_path_factory.mktemp("variable"), Watched, reward=judge, **changes) as trainer:
        trainer.train()
    return trainer, engine_of(trainer), judge, request.param


def test_each_row_is_a_request_of_its_own_and_each_prompt_is_asked_as_often_as_allocated(run):
    trainer, engine, judge, kind = run
    tokenizer = trainer.processing_class
    handed_out = trainer.curriculum.allocation.handed_out
    assert len(engine.calls) == len(handed_out) == trainer.state.global_step
    for call, counts in zip(engine.calls, handed_out):
        assert call.params.n == 1 and len(call.prompts) == PROMPTS * GENERATIONS
        asked = Counter(map(tuple, call.prompts))
        assert asked == {tuple(tokenizer(prompt)["input_ids"]): count for prompt, count in counts.items()}
    assert any(len(set(counts.values())) > 1 for counts in handed_out)
    assert handed_out[0] != handed_out[-1]


def test_the_completions_stay_with_their_prompts_and_columns(run):
    trainer, engine, judge, _ = run
    answers = dict(zip(trainer.train_dataset["prompt"], trainer.train_dataset["answer"]))
    for call, batch in zip(engine.calls, judge.batches, strict=True):
        assert call.prompts == trainer.processing_class(batch["prompts"])["input_ids"]
        assert [completion for (completion,) in call.completions] == batch["ids"]
        assert batch["prompt_id"] == batch["prompts"]
        assert batch["answer"] == [answers[prompt] for prompt in batch["prompts"]]


def test_the_importance_ratio_is_one_with_weights_sent_before_each_generation(run):
    trainer, engine, _, _ = run
    assert_ratio_is_one(trainer)
    assert [call.syncs for call in engine.calls] == list(range(1, 1 + trainer.state.global_step))
    for names in engine.syncs:
        assert sorted(names) == sorted(engine.weights())


def test_advantages_are_those_of_the_true_groups(run):
    trainer, _, judge, kind = run
    differing = 0
    for batch, seen in zip(judge.batches, trainer.seen, strict=True):
        groups = defaultdict(list)
        for row, prompt in enumerate(batch["prompts"]):
            groups[prompt].append(row)
        for prompt, rows in groups.items():
            rewards = torch.tensor([Judge.score(prompt, batch["ids"][row]) for row in rows])
            assert rewards.tolist() == [seen["reward"][row] for row in rows]
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            if "sample" not in kind:
                expected *= GENERATIONS / len(rows)
            torch.testing.assert_close(seen["advantages"][rows], expected, rtol=0, atol=1e-5)
            differing += bool(expected.abs().max() > 0.1)
    assert differing >= 3


def test_truncated_completions_are_masked_row_by_row(run):
    trainer, _, judge, kind = run
    # TRL takes a pad at the end, which an untrained model writes too, for an end.
    ends_with = (trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id)
    ended = [[ids[-1] in ends_with for ids in batch["ids"]] for batch in judge.batches]
    assert {True, False} == {e for batch in ended for e in batch}
    for batch, seen, ends in zip(judge.batches, trainer.seen, ended):
        kept = [len(ids) if end or kind != "truncated" else 0 for ids, end in zip(batch["ids"], ends)]
        assert seen["completion_mask"].sum(1).tolist() == kept


# -- weights --------------------------------------------------------------------------------------------------------
STEPS = 2
ALL_LINEAR = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
FAST_DORA = "fast_dora"


def peft_config_of(kind):
    if kind in KINDS | DORA:
        return config_of(kind)
    cls, fields = METHODS["peft_dora" if kind == FAST_DORA else kind]
    return cls(**{**ALL_LINEAR, **fields})


SENT = ["lora", "rslora", "peft_dora", FAST_DORA, "miss", "pmss", "bone", "bat_row", "edora"]
SENT_TOO = ["pissa", "miss_bat", "adalora", "ia3", "oft", "vera", "loha"]
SENT_TOO += ["pmss_normalised", "row", "mini", "bat_col", "lora_xs"]


def synchronised(world, out, kind, steps=STEPS, **changes):
    """A trainer after a run whose weights go to the engine `steps` times, and what [`Syncs`] saw."""
    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "max_completion_length": 4, **changes}
    with fast_dora() if kind == FAST_DORA else nullcontext():
        with built(world, out, peft_config=peft_config_of(kind), **settings) as trainer:
            syncs = Syncs(trainer, world, partial(peft_config_of, kind))
            trainer.train()
    assert len(engine_of(trainer).syncs) == steps == len(syncs.received)
    return trainer, syncs


@pytest.mark.parametrize("kind", [*SENT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SENT_TOO)])
def test_the_engine_has_exactly_the_merged_weights_and_the_model_is_untouched(world, tmp_path, kind):
    trainer, syncs = synchronised(world, tmp_path, kind)
    assert_exact(syncs, STEPS)
    assert_ratio_is_one(trainer, 1e-5)
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(world).named_parameters()]
    assert engine_of(trainer).syncs == [names] * STEPS


@pytest.mark.parametrize("kind", [FAST_DORA, "miss"])
@pytest.mark.parametrize("mode", [{"vllm_mode": "server"}, {"vllm_enable_sleep_mode": True}], ids=str)
def test_so_it_has_on_a_server_and_after_sleep(world, tmp_path, kind, mode):
    trainer, syncs = synchronised(world, tmp_path, kind, **mode)
    assert_exact(syncs, STEPS)
    assert_ratio_is_one(trainer, 1e-5)


def test_the_reference_stays_out(world, tmp_path):
    trainer, syncs = synchronised(world, tmp_path, "lora", beta=0.1, trained_before=True)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert_exact(syncs, STEPS)


def test_truncated_completions_and_a_capped_ratio(world, tmp_path):
    """Masked rows and importance sampling correction see the engine's log-probabilities as those of the policy."""
    trainer, syncs = synchronised(
        world,
        tmp_path,
        "peft_dora",
        mask_truncated_completions=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_cap=1.0 + 1e-5,
    )
    assert_exact(syncs, STEPS)
    assert_ratio_is_one(trainer, 1e-5)


@pytest.fixture(scope="module")
def bf16_world(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16_world")
    AutoModelForCausalLM.from_pretrained(world, dtype=torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(world).save_pretrained(path)
    return str(path)


def drift(weights):
    start, end = weights
    return max(((end[n].float() - p.float()).norm() / p.float().norm()).item() for n, p in start.items())


@pytest.mark.parametrize("kind", ["lora", "peft_dora", "miss"])
def test_a_base_in_16_bits_does_not_drift_as_it_does_with_trl(bf16_world, tmp_path, kind):
    moved = {}
    for cls, config_cls in ((DeltaGRPOTrainer, DeltaGRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)):
        settings = {"max_steps": 6, "per_device_train_batch_size": 8, "max_completion_length": 3}
        with built(
            bf16_world, tmp_path, cls, config_cls, peft_config=peft_config_of(kind), learning_rate=0.1, **settings
        ) as trainer:
            base = {n: p for n, p in trainer.model.named_parameters() if not p.requires_grad}
            assert {p.dtype for p in base.values()} == {torch.bfloat16}
            start = {n: p.clone() for n, p in base.items()}
            trainer.train()
        moved[cls] = drift([start, base])
    assert moved[DeltaGRPOTrainer] == 0.0 and moved[trl.GRPOTrainer] > 1e-4


# -- what vLLM cannot hold ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (lambda: peft.LoraConfig(**ALL_LINEAR, modules_to_save=["lm_head"]), "model.embed_tokens.weight and lm_head.weight are"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PREFIX_TUNING is no change of weights"),
    ],
)  # fmt: skip
def test_an_adapter_that_it_cannot_hold_is_refused_before_training(world, tmp_path, adapter, said):
    with pytest.raises(InputError, match=said), built(world, tmp_path, peft_config=adapter()):
        pass


def test_a_method_without_merging_is_refused_before_the_first_step(world, tmp_path):
    config = peft.LilyConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with built(world, tmp_path, peft_config=config) as trainer:
        with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj \(lily Linear\) cannot be merged"):
            trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_goes_out_dense(world, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(**{f"load_in_{bits}": True})
    # In colocated mode TRL refuses 8 bits, because of the engine that it would make.
    mode = {"4bit": "colocate", "8bit": "server"}[bits]
    with built(
        world,
        tmp_path,
        peft_config=lora(0.0),
        vllm_mode=mode,
        max_steps=2,
        model_kwargs={"quantization_config": quantised, "device_map": "cpu"},
    ) as trainer:
        base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        trainer.vllm_generation.sync_weights()
    received = engine_of(trainer).weights()
    layer = trainer.model.get_base_model().model.layers[0].mlp.down_proj
    expected = dequantised_weight(layer.get_base_layer()).float() + layer.get_delta_weight("default").float()
    torch.testing.assert_close(received["model.layers.0.mlp.down_proj.weight"], expected, rtol=1e-2, atol=1e-3)
    assert layer.get_delta_weight("default").abs().max() > 1e-3
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())


def test_only_the_codes_of_bitsandbytes_are_kept_from_the_engine(monkeypatch):
    asked = []

    def engine(*args, **kwargs):
        asked.append((args, kwargs))

    monkeypatch.setattr(vllm_generation, "LLM", engine, raising=False)
    with pytest.raises(ZeroDivisionError), dense_engine():
        vllm_generation.LLM("model", quantization="bitsandbytes", seed=1)
        vllm_generation.LLM(quantization="fp8")
        raise ZeroDivisionError
    assert asked == [(("model",), {"quantization": None, "seed": 1}), ((), {"quantization": "fp8"})]
    assert vllm_generation.LLM is engine


# -- versions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["0.21.9", "0.31.1", "0.33.0"])
def test_a_vllm_that_trl_does_not_support_is_refused_with_what_to_install(world, tmp_path, monkeypatch, version):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "vllm" else installed(name))
    said = f"vllm {version} is installed, and TRL 1.16 supports 0.22.0 to 0.31.0: pip install -c constraints-vllm.txt"
    with pytest.raises(InputError, match=re.escape(said)), built(world, tmp_path):
        pass
    for supported in ("0.22.0", "0.31.0", "0.31.0+cu129"):
        assert vllm_mismatch(supported) is None


def test_the_range_is_that_of_trl_and_the_constraints_lie_in_it():
    first, last = SUPPORTED_VLLM
    source = inspect.getsource(import_utils.is_vllm_available)
    assert f'Version("{first}") <= _vllm_base_version <= Version("{last}")' in source
    root = Path(__file__).parents[2]
    constraints = (root / "constraints-vllm.txt").read_text()
    assert vllm_mismatch(re.search(r"^vllm==(.+)$", constraints, re.M)[1]) is None
    assert f"{first} to {last}" in constraints
    recipes = [text for path in (root / "recipes").rglob("*.yaml") if "use_vllm: true" in (text := path.read_text())]
    assert len(recipes) >= 4
    for text in recipes:
        assert "pip install -c constraints-vllm.txt" in text and f"TRL 1.16 supports vLLM {first} to {last}" in text
