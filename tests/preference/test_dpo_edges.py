"""What few runs do: tuned prompts, contrast models, two trainings, an own optimizer or rule, evaluations of other rows."""

import json
import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from hf_delta import DeltaDPOTrainer
from hf_delta.checkpoint import STATE_FILE, load_state
from hf_delta.errors import InputError
from hf_delta.preference.checks import check_models
from hf_delta.preference.contrast import add_contrast_weights
from hf_delta.preference.metrics import list_metrics
from hf_delta.preference.weights import TokenWeights
from tests.preference import dpo
from tests.preference.dpo import (
    BETA,
    World64,
    build,
    config,
    first_batch,
    list_rows,
    lora,
    loss_and_gradients,
    metrics,
    pair_loss,
    pair_rows,
    perturb,
    trained,
)
from tests.rl.frozen import build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def sparse(**kwargs):
    return {"loss_type": ["sparse_po"], "token_weights_kwargs": {"dropout": 0.0, **kwargs}}


# -- tuned prompts --------------------------------------------------------------------------------------------------
class TunedPrompt:
    """As [`World64`], by PEFT's own forward, which puts virtual tokens first."""

    def __init__(self, trainer):
        self.policy, self.adapter = trainer.model, trainer.reference_adapter

    plain = staticmethod(World64.plain)

    def forward(self, ids):
        found = self.policy(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), output_hidden_states=True)
        hidden = torch.stack(found.hidden_states[1:], dim=2)[0]
        return found.logits[0, -len(ids) :].log_softmax(-1), hidden[-len(ids) :]

    def reference(self, ids):
        if self.adapter is None:
            with self.policy.disable_adapter():
                return self.forward(ids)
        self.policy.set_adapter(self.adapter)
        found = self.forward(ids)
        self.policy.set_adapter("default")
        return found

    @torch.no_grad()
    def completions(self, batch, activations=False):
        found = []
        for row, real, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"]):
            ids, places = row[real], mask[real].nonzero()[:, 0]
            (policy, _), (reference, hidden) = self.forward(ids), self.reference(ids)
            policy, reference = policy[places - 1], reference[places - 1]
            tokens = range(len(places)), ids[places]
            kl = (reference.exp() * (reference - policy)).sum(-1)
            one = {"logp": policy[tokens], "ref_logp": reference[tokens], "kl": kl, "hidden": hidden[places - 1]}
            found.append(one)
        return found


@pytest.mark.parametrize(
    ("again", "kernel", "rule", "settings"),
    [
        (False, "trl", dpo.tdpo1, {"loss_type": ["tdpo1"]}),
        (False, "chunked", dpo.sparse_po, sparse()),
        (True, "chunked", dpo.tdpo1, {"loss_type": ["tdpo1"]}),
        (True, "trl", dpo.sparse_po, sparse()),
    ],
    ids=["new-tdpo1", "new-sparse", "again-tdpo1", "again-sparse"],
)
def test_a_tuned_prompt_and_one_that_is_trained_again(world, tmp_path, again, kernel, rule, settings):
    """The policy has virtual tokens ahead of the batch's; and so has the reference, if the policy was trained before."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = AutoModelForCausalLM.from_pretrained(world)
    given = {"model": get_peft_model(model, prompt)} if again else {"model": model, "peft_config": prompt}
    trainer = build(world, tmp_path, logps_kernel=kernel, **given, **settings)
    assert trainer.reference_adapter == ("ref" if again else None)
    perturb(trainer)
    with torch.no_grad():
        trainer.model.prompt_encoder["default"].embedding.weight += 0.3
    batch = first_batch(trainer)
    expected = pair_loss(TunedPrompt(trainer), batch, rule)
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5 and abs(loss - math.log(2)) > 1e-3
    assert any("prompt_encoder" in name for name in gradients)


# -- contrast models ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def contrast(world, tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("contrast"), {}
    for seed, name in enumerate(("positive", "negative")):
        model, generator = AutoModelForCausalLM.from_pretrained(world), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        paths[name] = str(folder / name)
        model.save_pretrained(paths[name])
        AutoTokenizer.from_pretrained(world).save_pretrained(paths[name])
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_weights_of_contrast_models_are_made_for_training_and_evaluation(world, contrast, tmp_path, mode):
    settings = {"max_length": 10, "truncation_mode": mode, "per_device_eval_batch_size": 8}
    trainer = build(
        world,
        tmp_path,
        loss_type=["tis_dpo"],
        token_weights_kwargs={**contrast, "high": 0.5},
        eval_dataset={"one": Dataset.from_list(pair_rows(3)), "two": Dataset.from_list(pair_rows())},
        **settings,
    )
    columns = ["chosen_weights", "rejected_weights"]
    rows = trainer.train_dataset.remove_columns(columns)
    cut = {"max_length": 10, "truncation_mode": mode}
    expected = add_contrast_weights(rows, **contrast, batch_size=8, high=0.5, progress=False, **cut)
    for column in columns:
        for found, weights in zip(trainer.train_dataset[column][:], expected[column][:], strict=True):
            assert found == pytest.approx(weights, abs=1e-5)
    assert len({round(weight, 4) for weights in expected["chosen_weights"][:] for weight in weights}) > 9
    perturb(trainer)
    batch = first_batch(trainer)
    assert batch["input_ids"].shape[1] == 10
    loss, _ = loss_and_gradients(trainer, batch)
    assert abs(loss - pair_loss(World64(trainer), batch, dpo.columns).item()) < 1e-5
    # The evaluation of rows that come later is that of rows that were there from the start.
    given = trainer.evaluate()
    later = trainer.evaluate(Dataset.from_list(pair_rows()))["eval_loss"]
    again = trainer.evaluate(trainer.eval_dataset["two"])["eval_loss"]
    assert given["eval_two_loss"] == pytest.approx(later, abs=1e-6) == pytest.approx(again, abs=1e-6)
    assert given["eval_one_loss"] != pytest.approx(later, abs=1e-4)


# -- optimizers -----------------------------------------------------------------------------------------------------
def test_a_second_training_finds_the_groups_of_the_first(world, tmp_path):
    trainer = build(world, tmp_path, **sparse(weight_decay=0.3))
    sizes = []
    for _ in range(2):
        trainer.train()
        sizes.append([(len(group["params"]), group["weight_decay"]) for group in trainer.optimizer.param_groups])
    assert sizes[0] == sizes[1] and sizes[0][-1] == (len(list(trainer.mask_network.parameters())), 0.3)


def test_an_optimizer_that_cannot_know_the_mask_network(world, tmp_path):
    model, rows = AutoModelForCausalLM.from_pretrained(world), Dataset.from_list(pair_rows())

    def given(**settings):
        kwargs = {"train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(world)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return DeltaDPOTrainer(model, args=config(tmp_path, **settings), optimizers=(optimizer, None), **kwargs)

    with pytest.raises(InputError, match="does not train the mask network of sparse_po"):
        given(**sparse())
    trainer = given(loss_type=["tdpo1"])
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


# -- losses and metrics ---------------------------------------------------------------------------------------------
def test_a_penalty_and_sft_are_both_added(world, tmp_path):
    settings = {**sparse(l1_reward=0.02), "loss_type": ["sparse_po", "sft"], "loss_weights": [0.5, 0.3]}
    trainer = build(world, tmp_path, **settings)
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)

    def penalty(chosen, rejected):
        return 0.01 * (sum(chosen["masks"][0]) + sum(rejected["masks"][0]))

    def zero(chosen, rejected):
        return 0.0

    total, preference = (pair_loss(brute, batch, dpo.sparse_po, each) for each in (penalty, zero))
    chosen = brute.completions(batch)[: len(batch["input_ids"]) // 2]
    sft = -torch.cat([one["logp"] for one in chosen]).mean()
    expected = 0.5 * preference + (total - preference) + 0.3 * sft
    assert abs((total - preference).item()) > 1e-3
    assert abs(loss_and_gradients(trainer, batch)[0] - expected.item()) < 1e-5


def test_lengths_are_trls_where_nothing_comes_before_a_completion(world, tmp_path):
    """TRL divides by all tokens of the completion, the first of which has no log-probability then."""
    losses = []
    for cls, config_cls, more in (
        (trl.DPOTrainer, trl.DPOConfig, {}),
        (DeltaDPOTrainer, dpo.DeltaDPOConfig, {"token_weights": "tests.preference.test_dpo.ones"}),
    ):
        trainer = build(world, tmp_path, cls, config_cls, loss_type=["ipo"], peft_config=lora(), **more)
        perturb(trainer)
        batch = first_batch(trainer)
        batch["completion_mask"] = batch["attention_mask"].clone()
        losses.append(loss_and_gradients(trainer, batch)[0])
    assert losses[0] == losses[1]


def test_what_is_logged_of_kl_and_weights(world, tmp_path):
    """Of a single step from a known place, by brute force."""
    trainer = build(world, tmp_path, per_device_train_batch_size=8, max_steps=1, **sparse(sharing="independent"))
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)
    found = brute.completions(batch)
    for one in found:
        dpo.sparse_po(one, "", brute.policy.hfd_token_mask)
    trainer.train()
    logged = metrics(trainer)[0]
    for place, name in enumerate(("reward", "kl")):
        masks = torch.tensor([mask.item() for one in found for mask in one["masks"][place]])
        assert logged[f"weights/{name}_mean"] == pytest.approx(masks.mean().item(), abs=1e-5)
        assert logged[f"weights/{name}_zero"] == pytest.approx((masks == 0).double().mean().item(), abs=1e-6)
    assert 0 < logged["weights/reward_zero"] < 1
    for side, ones in (("chosen", found[:8]), ("rejected", found[8:])):
        expected = sum(one["kl"].sum().item() for one in ones) / 8
        assert logged[f"kl/{side}"] == pytest.approx(expected, rel=1e-4)
    assert BETA == trainer.beta and abs(logged["kl/chosen"] - logged["kl/rejected"]) > 1e-3


def test_losses_of_a_prediction_are_not_in_the_next_evaluation(world, tmp_path):
    settings = {"feasible": True, "feasible_kwargs": {"epsilon": 0.5}}
    trainer = build(world, tmp_path, eval_dataset=Dataset.from_list(pair_rows(5)), **settings)
    perturb(trainer)
    names = ("loss_mean", "loss_max", "loss_cvar", "satisfied")
    reports = []
    for _ in range(2):
        trainer.evaluate()
        reports.append([trainer.state.log_history[-1][f"eval_feasible/{name}"] for name in names])
        trainer.predict(trainer.train_dataset)
    assert reports[0] == reports[1]


# -- rules of one's own ---------------------------------------------------------------------------------------------
def likelier(batch):
    """Weights out of everything in a batch that might have a gradient."""
    return batch.logps.exp() * batch.mask, batch.kl.sqrt() * batch.mask


likelier.needs = {"kl"}


def test_no_gradient_flows_through_what_a_rule_sees(world, tmp_path):
    trainer = build(world, tmp_path, token_weights="tests.preference.test_dpo_edges.likelier")
    perturb(trainer)
    batch, brute = first_batch(trainer), World64(trainer)

    def rule(one, side, network):
        return dpo.score(one, one["logp"].detach().exp(), one["kl"].detach().sqrt())

    expected = pair_loss(brute, batch, rule)
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - expected.item()) < 1e-5
    assert max((gradients[n] - g).abs().max().item() for n, g in brute.gradients(expected).items()) < 1e-5


class Counting(TokenWeights):
    """A rule with a state."""

    calls = 0

    def weights(self, batch):
        self.calls += 1
        return super().weights(batch)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_the_state_of_a_rule_is_in_a_checkpoint(world, tmp_path):
    run = {"token_weights": "tests.preference.test_dpo_edges.Counting", "save_strategy": "steps", "save_steps": 1}
    first = trained(world, tmp_path, max_steps=2, **run)
    second = build(world, tmp_path, max_steps=2, **run)
    assert first.rule.calls > 2 and second.rule.calls == 0
    second.load_extra_state(tmp_path / "checkpoint-2")
    assert second.rule.calls == load_state(tmp_path / "checkpoint-2" / STATE_FILE)["rule"]["calls"] > 2


def test_the_last_step_has_a_picture(world, tmp_path):
    """Also where it is not one of those at equal distances, five steps apart here."""
    trainer = build(world, tmp_path, loss_type=["d2po"])
    trainer.model.train()
    trainer.state.max_steps = 100
    for step in (97, 98, 99, 100):
        trainer.state.global_step = step
        trainer.write_examples()
    snapshots = json.loads((tmp_path / "token_weights.json").read_text())["snapshots"]
    assert [snapshot["step"] for snapshot in snapshots] == [97, 100]
    assert snapshots[0]["examples"][0]["reward"][:2] == [1.0, 0.98]


# -- lists and models -----------------------------------------------------------------------------------------------
def test_labels_are_the_scores_without_rescaling(world, tmp_path):
    rows = [{**row, "scores": [score / 4 for score in row["scores"]]} for row in list_rows()]
    for rescale in (True, False):
        trainer = build(world, tmp_path, rows=rows, loss_type=["lipo_lambda"], list_rescale=rescale)
        labels = trainer.train_dataset["list_labels"][:]
        assert (labels == [row["scores"] for row in rows]) is not rescale
        assert rescale is (max(map(max, labels)) == 1.0)


def test_worst_and_best_are_of_the_list_and_not_of_its_padding():
    rewards = torch.tensor([[1.0, 5.0, 2.0], [4.0, -3.0, float("nan")]])
    labels = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    there = torch.tensor([[True, True, True], [True, True, False]])
    mask = torch.ones(5, 1)
    found = list_metrics(rewards, labels, there, mask, {"entropy": mask})
    found = {name: (share.total / share.count).item() for name, share in found.items()}
    # Of four pairs with different labels, that of 5 and 2 is in the wrong order.
    expected = {"best": 3.0, "worst": -1.0, "margins": 4.0, "accuracies": 0.75}
    assert {name: found[f"rewards/{name}"] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(30, 32), (32, 30)])
def test_vocabularies_of_two_sizes(sizes):
    models = []
    for size in sizes:
        models.append(torch.nn.Module())
        models[-1].config = PretrainedConfig(vocab_size=size)
    with pytest.raises(InputError, match=f"vocabulary of {sizes[0]} tokens and the reference one of {sizes[1]}"):
        check_models(*models, router_loss=False)
    check_models(models[0], models[0], router_loss=False)
