"""The trainer against TRL's own, and against every loss by brute force."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_delta import DeltaDPOConfig, DeltaDPOTrainer
from hf_delta.preference.feasible import tail_report
from hf_delta.preference.resume import MASK_FILE
from hf_delta.preference.weights import TokenWeights
from tests.preference import dpo
from tests.preference.dpo import (
    BETA,
    World64,
    assert_metrics,
    build,
    first_batch,
    list_loss,
    list_rows,
    lora,
    loss_and_gradients,
    mask_parameters,
    metrics,
    pair_loss,
    pair_rows,
    parameters,
    perturb,
    trained,
)
from tests.rl.frozen import build_world
from tests.rl.test_trainer import assert_identical


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def ones(batch):
    return torch.ones_like(batch.logps)


def zeros(batch):
    return torch.zeros_like(batch.logps)


class OnesAndZeros(TokenWeights):
    """Reward weights 1 and KL weights 0, of a rule that needs the KL."""

    needs = frozenset({"kl"})

    def weights(self, batch):
        return torch.ones_like(batch.logps), torch.zeros_like(batch.logps)


def halves_and_positions(batch):
    """Weights that depend on what the batch holds: 1/2 for the reward, and the place of the token for the KL."""
    return torch.full_like(batch.logps, 0.5), batch.mask.cumsum(1) * batch.mask / 4


halves_and_positions.needs = {"kl"}


def first_tokens(batch):
    return batch.mask.cumsum(1) <= 2


FEASIBLE = {"feasible": True, "feasible_kwargs": {"epsilon": 0.3, "eta": 0.0}}
ONES = {"token_weights": "tests.preference.test_dpo.ones"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


# -- as TRL ---------------------------------------------------------------------------------------------------------
LOSSES = {
    "nothing": ({}, {}),
    "feasible": (FEASIBLE, {}),
    "ones": (ONES, {}),
    "feasible_hinge": (FEASIBLE, {"loss_type": ["hinge"]}),
    "ones_ipo": (ONES, {"loss_type": ["ipo"]}),
    "feasible_sigmoid_norm": (FEASIBLE, {"loss_type": ["sigmoid_norm"]}),
    "ones_robust": (ONES, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "ones_sft": (ONES, {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.4]}),
}


def lora_or_full(cases, fast):
    """Every case with and without an adapter; those not in `fast` belong to the slow tier."""
    for case in cases:
        for kind in ("lora", "full"):
            marks = () if (case, kind) in fast else pytest.mark.slow
            yield pytest.param(case, kind == "lora", marks=marks, id=f"{case}-{kind}")


@pytest.mark.parametrize(
    ("case", "peft"),
    lora_or_full(
        LOSSES,
        {(case, kind) for case in ("nothing", "feasible", "ones") for kind in ("lora", "full")}
        | {
            ("feasible_hinge", "full"),
            ("ones_ipo", "lora"),
            ("feasible_sigmoid_norm", "lora"),
            ("ones_robust", "full"),
        }
        | {("ones_sft", "lora")},
    ),
)
def test_parameters_and_metrics_are_trl_bit_for_bit(world, tmp_path, case, peft):
    changes, loss = LOSSES[case]
    settings = {"peft_config": lora(0.2) if peft else None, "eval_dataset": Dataset.from_list(pair_rows(5))}
    settings |= {**EVALUATED, **loss, "max_steps": 3}
    theirs = trained(world, tmp_path / "a", trl.DPOTrainer, trl.DPOConfig, **settings)
    ours = trained(world, tmp_path / "b", **settings, **changes)
    assert ours.replaces_loss == bool(changes)
    assert_identical(parameters(theirs), parameters(ours))
    assert any("eval_loss" in row for row in metrics(ours))
    # A product with ones is summed in the same order; the metrics of ours are added up over processes in float64.
    assert_metrics(metrics(ours), metrics(theirs), tolerance=1e-6 if changes else 0.0)
    start = AutoModelForCausalLM.from_pretrained(world).state_dict()
    end = ours.model.state_dict()
    assert peft or any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_a_plain_config_is_trl_bit_for_bit(world, tmp_path, peft):
    settings = {"peft_config": lora(0.2) if peft else None, "config_cls": trl.DPOConfig, "max_steps": 3}
    theirs, ours = (trained(world, tmp_path, cls, **settings) for cls in (trl.DPOTrainer, DeltaDPOTrainer))
    assert_identical(parameters(theirs), parameters(ours))
    assert metrics(theirs) == metrics(ours)


CHUNKED = {
    "sigmoid": {},
    "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "use_weighting": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.4},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "precompute": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize(
    ("case", "peft"),
    lora_or_full(
        CHUNKED,
        {
            ("sigmoid", "full"),
            ("sft", "lora"),
            ("use_weighting", "full"),
            ("ld_alpha", "lora"),
            ("precompute", "lora"),
        },
    ),
)
def test_the_chunked_kernel_gives_what_trls_gives(world, tmp_path, case, peft):
    # SGD: Adam makes 1e-2 of a gradient of 1e-9.
    settings = {"peft_config": lora() if peft else None, "optim": "sgd", "learning_rate": 0.1, **CHUNKED[case]}
    settings |= {**EVALUATED, "eval_dataset": Dataset.from_list(pair_rows(5))}
    theirs = trained(world, tmp_path / "a", trl.DPOTrainer, trl.DPOConfig, **settings)
    ours = trained(world, tmp_path / "b", logps_kernel="chunked", **settings)
    found, expected = parameters(ours), parameters(theirs)
    assert found.keys() == expected.keys()
    assert max((found[n] - p).abs().max().item() for n, p in expected.items()) < 1e-6
    assert_metrics(metrics(ours), metrics(theirs), tolerance=1e-5)


# -- brute force ----------------------------------------------------------------------------------------------------
def with_columns(rows, each):
    """Weights of rows, `each(row, side, tokens)`; every character is a token, and the end is one."""
    return [{**row, **{f"{s}_weights": each(i, s, len(row[s]) + 1) for s in ("chosen", "rejected")}} for i, row in enumerate(rows)]  # fmt: skip


def per_pair(i, side, tokens):
    return 0.25 * (i % 4) + (side == "chosen") * 0.5


def per_token(i, side, tokens):
    return [((i + 2 * t) % 5) / 3 for t in range(tokens)]


def l1(reward, kl):
    return lambda *pair: sum(reward * sum(one["masks"][0]) + kl * sum(one["masks"][1]) for one in pair)


SPARSE = {"loss_type": ["sparse_po"]}


def sparse(**kwargs):
    return {**SPARSE, "token_weights_kwargs": {"dropout": 0.0, **kwargs}}


# name: (rule by brute force, settings, weights of rows, penalty)
ORACLES = {
    "tdpo1": (dpo.tdpo1, {"loss_type": ["tdpo1"]}, None, None),
    "tdpo2": (dpo.tdpo2, {"loss_type": ["tdpo2"]}, None, None),
    "d2po": (dpo.d2po, {"loss_type": ["d2po"], "token_weights_kwargs": {"gamma": 0.9}}, None, None),
    "mapo": (dpo.mapo, {"loss_type": ["mapo"]}, None, None),
    "sparse_common": (
        dpo.sparse_po,
        sparse(l1_reward=0.01, l1_kl=0.03),
        None,
        # A common mask is there once, and its two terms are halved.
        l1(0.005, 0.015),
    ),
    "sparse_independent": (
        dpo.sparse_po,
        sparse(sharing="independent", l1_reward=0.01, l1_kl=0.03),
        None,
        l1(0.01, 0.03),
    ),
    "sparse_two_layer_last": (
        partial(dpo.sparse_po, two_layer=True),
        sparse(layers="last", net="two_layer"),
        None,
        None,
    ),
    "columns_per_pair": (dpo.columns, {"token_weights": "columns"}, per_pair, None),
    "columns_kl": (
        dpo.columns_kl,
        {"token_weights": "columns", "token_weights_kwargs": {"kl": True}},
        per_token,
        None,
    ),
    "tis_dpo": (dpo.columns, {"loss_type": ["tis_dpo"]}, per_token, None),
    "function": (
        lambda one, side, network: dpo.score(one, [1.0 if t < 2 else 0.0 for t in range(len(one["logp"]))]),
        {"token_weights": "tests.preference.test_dpo.first_tokens"},
        None,
        None,
    ),
    "function_kl": (
        lambda one, side, network: dpo.score(
            one, [0.5] * len(one["logp"]), [(t + 1) / 4 for t in range(len(one["kl"]))]
        ),
        {"token_weights": "tests.preference.test_dpo.halves_and_positions"},
        None,
        None,
    ),
}


def assert_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert max(g.abs().max().item() for g in expected.values()) > 1e-2
    assert {n: d for n, g in expected.items() if (d := (found[n] - g).abs().max().item()) > 1e-5} == {}


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kernel", ["trl", "chunked"])
@pytest.mark.parametrize("name", ORACLES)
def test_loss_and_gradients_equal_brute_force(world, tmp_path, name, kernel, peft):
    rule, settings, weights, penalty = ORACLES[name]
    rows = pair_rows() if weights is None else with_columns(pair_rows(), weights)
    trainer = build(world, tmp_path, rows=rows, logps_kernel=kernel, peft_config=lora() if peft else None, **settings)
    perturb(trainer)
    batch = first_batch(trainer)
    brute = World64(trainer)
    expected = pair_loss(brute, batch, rule, penalty)
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5
    assert abs(loss - math.log(2)) > 1e-3
    assert_gradients(gradients, brute.gradients(expected))
    assert any("hfd_token_mask" in name for name in gradients) == name.startswith("sparse")


@pytest.mark.parametrize("kernel", ["chunked"])
def test_some_masks_are_zero_in_the_oracle(world, tmp_path, kernel):
    """What the gradients are compared at is not the start, where every mask is above 0."""
    trainer = build(world, tmp_path, logps_kernel=kernel, **sparse())
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)
    found = brute.completions(batch)
    masks = [dpo.mask_of(trainer.mask_network.reward.double(), h).item() for one in found for h in one["hidden"]]
    assert min(masks) == 0.0 and max(masks) > 0.5


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kernel", ["trl", "chunked"])
def test_the_sampled_kl_is_k3_of_the_tokens(world, tmp_path, kernel, peft):
    def tdpo1(one, side, network):
        ratio = one["logp"] - one["ref_logp"]
        return ratio.sum() + (ratio.exp() - 1 - ratio).sum()

    trainer = build(
        world,
        tmp_path,
        kl="sampled",
        loss_type=["tdpo1"],
        logps_kernel=kernel,
        peft_config=lora() if peft else None,
    )
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)
    expected = pair_loss(brute, batch, tdpo1)
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5
    assert_gradients(gradients, brute.gradients(expected))
    assert abs(loss - pair_loss(brute, batch, dpo.tdpo1).item()) > 1e-4


@pytest.mark.parametrize("kernel", ["trl", "chunked"])
@pytest.mark.parametrize("name", ["list_logistic", "lipo_lambda", "plackett_luce"])
def test_lists_of_varying_length_equal_brute_force(world, tmp_path, name, kernel):
    trainer = build(world, tmp_path, loss_type=[name], logps_kernel=kernel, peft_config=lora())
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)
    assert len(set(batch["list_mask"].sum(1).tolist())) > 1
    expected = list_loss(brute, batch, getattr(dpo, name))
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5
    assert_gradients(gradients, brute.gradients(expected))


@pytest.mark.parametrize("name", ["list_logistic", "list_softmax", "plackett_luce"])
def test_lists_of_two_are_trls_dpo(world, tmp_path, name):
    pairs = pair_rows()
    lists = [
        # Every second one the other way round.
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"]][:: 1 - 2 * (i % 2)],
            "scores": [7.0, -2.0][:: 1 - 2 * (i % 2)],
        }
        for i, row in enumerate(pairs)
    ]
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "peft_config": lora()}
    theirs = trained(world, tmp_path / "a", trl.DPOTrainer, trl.DPOConfig, rows=pairs, **settings)
    ours = trained(world, tmp_path / "b", rows=lists, loss_type=[name], **settings)
    found = parameters(ours)
    assert max((found[n] - p).abs().max().item() for n, p in parameters(theirs).items()) < 1e-6
    for one, other in zip(metrics(ours), metrics(theirs)):
        for key in ("loss", "rewards/accuracies", "rewards/margins", "entropy", "num_tokens"):
            assert abs(one[key] - other[key]) < 1e-5


def test_the_weight_of_a_list_loss_counts(world, tmp_path):
    once, twice = (
        build(world, tmp_path, peft_config=lora(), loss_type=["lipo_lambda"], loss_weights=weights)
        for weights in (None, [2.0])
    )
    for trainer in (once, twice):
        perturb(trainer)
    loss, _ = loss_and_gradients(once, first_batch(once))
    assert loss_and_gradients(twice, first_batch(twice))[0] == pytest.approx(2 * loss) != 0


# -- limits ---------------------------------------------------------------------------------------------------------
def end_of(world, out, **changes):
    trainer = build(world, out, peft_config=lora(), **changes)
    perturb(trainer)
    return loss_and_gradients(trainer, first_batch(trainer))


def test_masks_of_one_are_tdpo1(world, tmp_path):
    trainer = build(world, tmp_path, peft_config=lora(), **sparse())
    perturb(trainer)
    with torch.no_grad():
        trainer.mask_network.reward.weight.zero_()
        trainer.mask_network.reward.bias.fill_(1.0)
        trainer.mask_network.reward.mixer.fill_(1 / len(trainer.mask_network.reward.mixer))
    loss, found = loss_and_gradients(trainer, first_batch(trainer))
    expected_loss, expected = end_of(world, tmp_path, loss_type=["tdpo1"])
    assert abs(loss - expected_loss) < 1e-6
    assert all((found[n] - g).abs().max() < 1e-6 for n, g in expected.items())


def test_reward_one_and_kl_zero_is_dpo_and_zeros_are_log_two(world, tmp_path):
    expected_loss, expected = end_of(world, tmp_path)
    loss, found = end_of(world, tmp_path, token_weights="tests.preference.test_dpo.OnesAndZeros")
    assert abs(loss - expected_loss) < 1e-6 and abs(loss - math.log(2)) > 1e-2
    assert all((found[n] - g).abs().max() < 1e-6 for n, g in expected.items())
    loss, found = end_of(world, tmp_path, token_weights="tests.preference.test_dpo.zeros")
    assert loss == pytest.approx(math.log(2), abs=1e-7) and all(g.abs().max() == 0 for g in found.values())


# -- references -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ["trl", "chunked"])
@pytest.mark.parametrize("name", ["tdpo2", "sparse_common"])
def test_a_reference_model_of_its_own(world, tmp_path, name, kernel):
    """A reference that is not where the policy started, with a head of its own."""
    rule, settings, _, penalty = ORACLES[name]
    reference = AutoModelForCausalLM.from_pretrained(world)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    trainer = build(world, tmp_path, ref_model=reference, logps_kernel=kernel, **settings)
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)
    expected = pair_loss(brute, batch, rule, penalty)
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5
    assert_gradients(gradients, brute.gradients(expected))


@pytest.mark.parametrize("kernel", ["trl", "chunked"])
def test_an_adapter_that_is_trained_again_is_held_to_itself(world, tmp_path, kernel):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    trainer = build(world, tmp_path, model=model, loss_type=["tdpo1"], logps_kernel=kernel)
    batch = first_batch(trainer)
    assert loss_and_gradients(trainer, batch)[0] == pytest.approx(math.log(2), abs=1e-6)
    perturb(trainer)
    brute = World64(trainer)
    assert brute.adapter == "ref"
    expected = pair_loss(brute, batch, dpo.tdpo1)
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5
    assert_gradients(gradients, brute.gradients(expected))


@pytest.mark.parametrize("kernel", ["trl", "chunked"])
def test_a_head_that_is_trained_whole_is_compared_with_the_one_it_was(world, tmp_path, kernel):
    model = AutoModelForCausalLM.from_pretrained(world, tie_word_embeddings=False)
    settings = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}
    peft_config = LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    trainer = build(world, tmp_path, model=model, peft_config=peft_config, loss_type=["tdpo1"], logps_kernel=kernel)
    batch = first_batch(trainer)
    perturb(trainer)
    brute = World64(trainer)
    expected = pair_loss(brute, batch, dpo.tdpo1)
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5
    assert any("lm_head" in name for name in gradients)
    assert_gradients(gradients, brute.gradients(expected))


# -- the mask network -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_the_mask_network_is_trained_and_never_deployed(world, tmp_path, peft):
    settings = {**sparse(weight_decay=0.3), "weight_decay": 0.05, "save_strategy": "steps", "save_steps": 2}
    trainer = build(world, tmp_path, peft_config=lora() if peft else None, **settings)
    before = mask_parameters(trainer)
    trainer.train()
    after = mask_parameters(trainer)
    assert all(not torch.equal(before[name], value) for name, value in after.items())
    groups = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    own = {id(p) for p in trainer.mask_network.parameters()}
    assert {groups[name] for name in own} == {0.3}
    assert {decay for name, decay in groups.items() if name not in own} <= {0.05, 0.0}
    assert len(groups) == sum(p.requires_grad for p in trainer.model.parameters())
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(groups)

    trainer.save_model(tmp_path / "final")
    trainer.model.save_pretrained(tmp_path / "pushed")
    saved = {"checkpoint-2": True, "final": False, "pushed": False}
    for folder, has_mask in saved.items():
        files = {p.name for p in (tmp_path / folder).iterdir()}
        assert (MASK_FILE in files) == has_mask, folder
        weights = load_file(tmp_path / folder / ("adapter_model.safetensors" if peft else "model.safetensors"))
        assert weights and not [name for name in weights if "hfd" in name or "mask" in name]
    assert_identical(load_file(tmp_path / "checkpoint-2" / MASK_FILE), after)
    assert "hfd" not in "".join(p.read_text() for p in (tmp_path / "final").glob("*.json"))


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_what_was_trained_loads_as_any_model_does(world, tmp_path, caplog, peft):
    trainer = trained(world, tmp_path / "run", peft_config=lora() if peft else None, **sparse())
    trainer.save_model(tmp_path / "final")
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        if peft:
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world), tmp_path / "final")
        else:
            loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
            assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not [record.message for record in caplog.records if "unexpected" in record.message.lower()]
    ids = torch.tensor([[5, 6, 7, 8]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model(ids).logits)


def test_the_picture_holds_the_masks_of_the_policy_as_it_is(world, tmp_path):
    """`token_weights.json`: what brute force gives for the model that the training ended with."""
    trainer = build(world, tmp_path, per_device_train_batch_size=8, **sparse(sharing="independent"))
    perturb(trainer)
    trainer.train()
    brute, batch, masks = World64(trainer), first_batch(trainer), {}
    for one, row, real in zip(brute.completions(batch), batch["input_ids"], batch["attention_mask"].bool()):
        dpo.sparse_po(one, "", brute.policy.hfd_token_mask)
        masks[trainer.processing_class.decode(row[real])] = one["masks"]
    snapshot = json.loads((tmp_path / "token_weights.json").read_text())["snapshots"][-1]
    seen = {
        example["prompt"] + "".join(example["tokens"]): (example["reward"], example["kl"])
        for example in snapshot["examples"]
    }
    assert seen and seen.keys() <= masks.keys()
    for text, found in seen.items():
        for mine, other in zip(found, masks[text]):
            assert mine == pytest.approx([value.item() for value in other], abs=1e-4)


def test_the_picture_is_of_the_end_where_an_evaluation_came_last(world, tmp_path):
    """The summary of a training is logged in the mode that its last evaluation left; steps that are no multiple of `logging_steps`."""
    settings = {"max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "loss_type": ["d2po"]}
    trained(world, tmp_path, eval_dataset=Dataset.from_list(pair_rows(5)), **settings)
    snapshots = json.loads((tmp_path / "token_weights.json").read_text())["snapshots"]
    assert snapshots[-1]["step"] == 3


# -- feasible learning ----------------------------------------------------------------------------------------------
class Witness(DeltaDPOTrainer):
    """Writes down every batch: losses of the samples before they are weighted, and the loss after."""

    def __init__(self, *args, **kwargs):
        self.seen, self.evaluated = [], []
        super().__init__(*args, **kwargs)

    def _feasible_loss(self, losses, inputs):
        loss = super()._feasible_loss(losses, inputs)
        if self.model.training:
            self.seen.append((inputs["sample_keys"].tolist(), losses.detach().clone(), loss.item()))
        else:
            self.evaluated.append(losses.detach().clone())
        return loss


def simulated(seen, epsilon, eta, alpha=None, initial=1.0):
    """Multipliers by the formula, and the loss of every batch, in plain Python."""
    multipliers, batches = {}, []
    for keys, losses, _ in seen:
        before = [multipliers.get(key, initial) for key in keys]
        batches.append(sum(m * x.item() for m, x in zip(before, losses)) / len(keys))
        for key, m, x in zip(keys, before, losses):
            step = x.item() - epsilon - (m / alpha if alpha is not None else 0.0)
            multipliers[key] = max(0.0, m + eta * step)
    return multipliers, batches


@pytest.mark.parametrize(
    "kwargs", [{"eta": 0.7}, {"eta": 0.5, "alpha": 0.8, "initial": 0.5}], ids=["plain", "resilient"]
)
@pytest.mark.parametrize("loss", ["sigmoid", "sparse_po", "lipo_lambda"])
def test_multipliers_are_those_of_the_formula(world, tmp_path, loss, kwargs):
    kwargs = {"epsilon": 0.45, **kwargs}
    settings = {"feasible": True, "feasible_kwargs": kwargs, "loss_type": [loss], "learning_rate": 2e-3}
    trainer = trained(
        world,
        tmp_path,
        Witness,
        peft_config=lora(),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    expected, batches = simulated(trainer.seen, **kwargs)
    # 8 rows, and 24 seen: every row thrice, in three orders.
    assert len(trainer.seen) == 12 and len(expected) == 8
    assert [loss for *_, loss in trainer.seen] == pytest.approx(batches, abs=1e-6)
    found = trainer.multipliers.weights(torch.tensor(list(expected)))
    assert found.tolist() == pytest.approx(list(expected.values()), abs=1e-6)
    assert len(set(found.tolist())) > 1
    logged = [row["loss"] for row in metrics(trainer)]
    if loss != "sparse_po":
        assert logged == pytest.approx([(a + b) / 2 for a, b in zip(batches[::2], batches[1::2])], abs=1e-5)
    last = {key: x for keys, losses, _ in trainer.seen for key, x in zip(keys, losses)}
    report = tail_report(torch.stack(list(last.values())), kwargs["epsilon"])
    entry = metrics(trainer)[-1]
    assert {f"feasible/{k}" for k in (*report, "samples", "multiplier_mean", "multiplier_max", "multiplier_zero")} == {
        k for k in entry if k.startswith("feasible/")
    }
    for name, value in report.items():
        assert entry[f"feasible/{name}"] == pytest.approx(value, abs=1e-6)
    assert entry["feasible/multiplier_max"] == pytest.approx(max(expected.values()), abs=1e-6)


def test_an_evaluation_is_reported_and_changes_nothing(world, tmp_path):
    """The rows of the evaluation are those of the training: their multipliers would be the ones to move."""
    settings = {
        "feasible": True,
        "feasible_kwargs": {"epsilon": 0.6, "eta": 0.7},
        "max_steps": 3,
        "peft_config": lora(),
    }
    rows = Dataset.from_list(pair_rows(7))
    without = trained(world, tmp_path / "a", Witness, **settings)
    trainer = trained(world, tmp_path / "b", Witness, eval_dataset=rows, **EVALUATED, **settings)
    assert_identical(parameters(without), parameters(trainer))
    assert_identical(without.multipliers.state_dict(), trainer.multipliers.state_dict())
    report = trainer.evaluate()
    losses = torch.cat(trainer.evaluated[-2:])
    assert len(losses) == 7 and abs(report["eval_loss"] - losses.mean()) < 1e-6
    for name, value in tail_report(losses, 0.6).items():
        assert trainer.state.log_history[-1][f"eval_feasible/{name}"] == pytest.approx(value, abs=1e-6)
    assert_identical(without.multipliers.state_dict(), trainer.multipliers.state_dict())


def test_keys_do_not_depend_on_order_and_follow_a_column(world, tmp_path):
    settings = {"feasible": True, "feasible_kwargs": {"epsilon": 0.6}, "max_steps": 2}
    rows = [{**row, "id": f"row{i}"} for i, row in enumerate(pair_rows())]
    found = [
        set(trained(world, tmp_path / str(i), rows=each, **settings, **more).multipliers.state_dict()["keys"].tolist())
        for i, (each, more) in enumerate(
            [
                (rows, {}),
                (rows[::-1], {}),
                (rows, {"sample_id_column": "id"}),
                (rows[::-1], {"sample_id_column": "id"}),
            ]
        )
    ]
    assert found[0] == found[1] != found[2] == found[3]
    # One id for two equal rows is one sample, and so are equal rows without ids.
    twice = [*rows[:4], *rows[:4]]
    for more in ({}, {"sample_id_column": "id"}):
        assert len(trained(world, tmp_path / "twice", rows=twice, **settings, **more).multipliers) == 4


def test_chosen_weights_of_more_than_max_length(world, tmp_path):
    """Truncation cuts weights with their tokens."""
    rows = with_columns(pair_rows(), per_token)
    trainer = build(world, tmp_path, rows=rows, token_weights="columns", max_length=8)
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)
    assert batch["input_ids"].shape[1] == 8
    expected = pair_loss(brute, batch, dpo.columns)
    assert abs(loss_and_gradients(trainer, batch)[0] - expected.item()) < 1e-5


def test_a_dict_of_evaluation_sets_and_an_evaluation_by_hand(world, tmp_path):
    sets = {"one": Dataset.from_list(pair_rows(3)), "two": Dataset.from_list(pair_rows(6))}
    trainer = build(world, tmp_path, eval_dataset=sets, loss_type=["tdpo1"], feasible=True, feasible_kwargs={"epsilon": 0.5})  # fmt: skip
    perturb(trainer)
    found = trainer.evaluate()
    by_hand = trainer.evaluate(Dataset.from_list(pair_rows(6)))
    assert found["eval_two_loss"] == pytest.approx(by_hand["eval_loss"], abs=1e-6)
    assert found["eval_one_loss"] != pytest.approx(found["eval_two_loss"], abs=1e-4)


def test_names_are_of_both(world, tmp_path):
    assert issubclass(DeltaDPOTrainer, trl.DPOTrainer) and issubclass(DeltaDPOConfig, trl.DPOConfig)
    trainer = build(world, tmp_path)
    assert trainer.beta == BETA and len(list_rows()) == len(pair_rows())
