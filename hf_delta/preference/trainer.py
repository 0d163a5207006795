"""DPO with token weights, lists of completions, and a bound on the loss of every sample."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl import DPOTrainer

from hf_delta._compat.trl_dpo import DataCollatorForPreference
from hf_delta.errors import InputError
from hf_delta.ops.gather import full_shape
from hf_delta.preference import feasible, lists
from hf_delta.preference.checks import (
    check_contrast,
    check_models,
    check_plain_config,
    check_rows,
    data_sets,
    needed_columns,
    prepared,
)
from hf_delta.preference.collate import DataCollatorWithColumns
from hf_delta.preference.config import DeltaDPOConfig
from hf_delta.preference.contrast import add_contrast_weights
from hf_delta.preference.list_data import DataCollatorForLists
from hf_delta.preference.losses import PAIR_LOSSES, completion_scores
from hf_delta.preference.metrics import list_metrics, mask_metrics, mean_of, means, pair_metrics
from hf_delta.preference.resume import ResumableDPO
from hf_delta.preference.scoring import ScoredTokens


logger = logging.getLogger(__name__)


class DeltaDPOTrainer(ResumableDPO):
    """
    Drop-in for [`~trl.DPOTrainer`]: token weights, lists of completions, feasible learning, exact KL, exact resume.

    With a plain [`~trl.DPOConfig`], or with no key of ours, it trains bit for bit like TRL's, but for a defect of TRL 1.16
    that it repairs: given a `PeftModel`, TRL copies only those weights of the adapter into the reference whose names end in
    `.<adapter>.weight`; with others (MiSS, VeRA, LoHa, ...) a policy that has been trained before is compared with the base
    model.

    Example:

    ```python
    from hf_delta import DeltaDPOConfig, DeltaDPOTrainer

    trainer = DeltaDPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=DeltaDPOConfig(output_dir="run", loss_type="tdpo2", beta=0.1),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        *args, **kwargs: As for [`~trl.DPOTrainer`].

    Raises:
        `InputError`: keys, data and models do not fit each other, a rule returns what is no weight, or a checkpoint belongs
        to another method, another version, or is damaged.
    """

    _tag_names = ["trl", "dpo", "hf_delta"]
    _name = "DPO (hf_delta)"

    def __init__(self, *args, **kwargs):
        given = inspect.signature(DPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        config = given.get("args")
        ours = isinstance(config, DeltaDPOConfig)
        if not ours:
            check_plain_config(config)
        self.replaces_loss = ours and config.replaces_loss
        self.rule = config.build_rule() if ours else None
        self.multipliers = config.build_multipliers() if ours else None
        self.exact_kl = not ours or config.kl == "exact"
        self.extra_columns = needed_columns(config, self.rule) if ours else ()
        self._config, self._rows_are_checked = config, False
        if self.replaces_loss:
            # Before a model is loaded.
            check_contrast(self.rule)
            for name, rows in data_sets(given.get("train_dataset"), given.get("eval_dataset")):
                check_rows(rows, f"{name}_dataset", config, self.rule)
                if isinstance(rows, IterableDataset):
                    # As TRL does for training: dispatched batches are cut at one length, and ours have tensors of several.
                    config.accelerator_config.dispatch_batches = False
            self._rows_are_checked = True
        super().__init__(*args, **kwargs)
        self._rows_are_checked = False
        self._eval_losses: list[torch.Tensor] = []
        if self.replaces_loss or (ours and config.logps_kernel == "chunked"):
            self._set_up()

    def _set_up(self) -> None:
        # Not `ref_model`, which DeepSpeed has wrapped already.
        reference = None if self.ref_model is None else self.plain_reference
        check_models(self.plain_model, reference, self.aux_loss_enabled)
        if self.replaces_loss and not self.accelerator.even_batches and self.accelerator.num_processes > 1:
            raise InputError(
                "accelerator_config: even_batches: false leaves processes without a batch that others wait for. Remove it."
            )
        self.add_token_heads(self.args.logps_kernel)
        if not self.replaces_loss:
            return
        if paper := self._paper_of_loss():
            self._paper = {"title": paper[0], "id": paper[1]}
        collator = self.data_collator
        if self.args.uses_lists and type(collator) is DataCollatorForPreference:
            collator = DataCollatorForLists(
                collator.pad_token_id, collator.max_length, collator.truncation_mode, collator.pad_to_multiple_of
            )
        self.data_collator = DataCollatorWithColumns(collator)
        if self.rule is None:
            return
        config = self.plain_reference.config.get_text_config()
        network = self.rule.network(config.hidden_size, config.num_hidden_layers)
        if network is not None:
            self._check_own_optimizer()
            self.attach_mask_network(network)
        if getattr(self.rule, "contrast", None):
            self.train_dataset = self._contrasted(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: self._contrasted(rows) for name, rows in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._contrasted(self.eval_dataset)

    def _paper_of_loss(self) -> tuple[str, str] | None:
        """Title and number of what the model card cites."""
        if self.args.uses_lists:
            return lists.PAPER
        if self.rule is not None and self.rule.paper is not None:
            return self.rule.paper
        return feasible.PAPER if self.multipliers is not None else None

    def _check_own_optimizer(self) -> None:
        if self.optimizer is not None:
            raise InputError(
                f"optimizers: the optimizer that was given does not train the mask network of {self.args.rule_name}, which is "
                "made here. Leave it out, and write optim and optim_args."
            )

    def _contrasted(self, dataset: Dataset) -> Dataset:
        """Tokenised rows with the weights of contrast models."""
        return add_contrast_weights(
            dataset,
            **self.rule.contrast,
            batch_size=self.args.per_device_eval_batch_size,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            vocab_size=full_shape(self.plain_model.get_input_embeddings().weight)[0],
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            progress=not self.args.disable_tqdm,
        )

    # -- rows -------------------------------------------------------------------------------------------------------
    def prepared_rows(self, dataset: Any, name: str, tokenized: Callable[..., Any]) -> Any:
        if not self.replaces_loss:
            return tokenized(dataset)
        source = f"{name}_dataset"
        if not self._rows_are_checked or isinstance(dataset, IterableDataset):
            dataset = check_rows(dataset, source, self._config, self.rule)
        rows = prepared(dataset, source, self._config, self.rule, tokenized)
        names = rows.column_names or ()
        # Rows of the constructor have their turn when there is a policy; those of an evaluation may be among them.
        if self._rows_are_checked or not getattr(self.rule, "contrast", None) or "chosen_weights" in names:
            return rows
        return self._contrasted(rows)

    # -- losses -----------------------------------------------------------------------------------------------------
    def loss_of_batch(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        scored = self.scored_tokens(model, inputs)
        losses, extra, metrics = (self._list_losses if self.args.uses_lists else self._pair_losses)(scored, inputs)
        loss = losses.mean()
        if self.multipliers is not None:
            loss = self._feasible_loss(losses, inputs)
        if extra is not None:
            loss = loss + extra
        self.count_tokens(inputs["attention_mask"])
        self.log_metrics(means(metrics, self.accelerator.gather))
        return loss

    def _pair_losses(self, scored: ScoredTokens, inputs: dict[str, Any]):
        """Loss of each pair `(B,)`, what else is minimised, and metrics."""
        terms = self.token_terms(scored, inputs)
        if terms is None:
            scores = scored.logps.sum(1) - scored.ref_logps.sum(1)
        else:
            constant = self.rule.constant_chosen_kl
            scores = completion_scores(scored.logps, scored.ref_logps, scored.kl, terms, scored.mask, constant)
        chosen, rejected = scores.chunk(2)
        lengths = dict(zip(("chosen_lengths", "rejected_lengths"), inputs["completion_mask"].sum(1).chunk(2)))
        options = {"ipo": lengths, "sigmoid_norm": lengths, "robust": {"label_smoothing": self.label_smoothing}}
        losses, extra = 0.0, None
        for name, weight in zip(self.args.pair_losses, self.loss_weights, strict=True):
            if name == "sft":
                extra = -weight * scored.logps.chunk(2)[0][scored.mask.chunk(2)[0]].mean()
            else:
                losses = losses + weight * PAIR_LOSSES[name](chosen, rejected, self.beta, **options.get(name, {}))
        metrics = pair_metrics(self.beta * scores, scored.logps.detach(), scored.kl, scored.mask, scored.statistics)
        if terms is not None:
            metrics |= mask_metrics(terms, scored.mask)
            if (penalty := self.rule.penalty(terms, scored.mask)) is not None:
                metrics["penalty"] = mean_of(penalty)
                extra = penalty.mean() if extra is None else extra + penalty.mean()
        return losses, extra, metrics

    def _list_losses(self, scored: ScoredTokens, inputs: dict[str, Any]):
        """As [`DeltaDPOTrainer._pair_losses`], for lists."""
        there, labels = inputs["list_mask"], inputs["list_labels"]
        scores = self.beta * (scored.logps.sum(1) - scored.ref_logps.sum(1))
        scores = lists.into_lists(scores, there)
        losses = self.loss_weights[0] * lists.LIST_LOSSES[self.args.loss_type[0]](scores, labels, there)
        return losses, None, list_metrics(scores, labels, there, scored.mask, scored.statistics)

    def _feasible_loss(self, losses: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """`mean(lambda_i l_i)` with the multipliers of before this batch, which then make their step; the mean in evaluation."""
        if not self.model.training:
            self._eval_losses.append(self.accelerator.gather_for_metrics(losses.detach()).float().cpu())
            return losses.mean()
        keys = inputs["sample_keys"]
        loss = (self.multipliers.weights(keys).to(losses.dtype) * losses).mean()
        self.multipliers.update(self.accelerator.gather(keys), self.accelerator.gather(losses.detach().float()))
        return loss

    def evaluate(self, *args, **kwargs):
        """As [`~trl.DPOTrainer.evaluate`]; `predict` leaves losses behind that nobody logs."""
        self._eval_losses = []
        return super().evaluate(*args, **kwargs)

    # -- what is told -----------------------------------------------------------------------------------------------
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.write_examples()
        if self.multipliers is not None:
            report = self.multipliers.report() if self.model.training else self._tail_of_evaluation()
            self.log_metrics({f"feasible/{name}": value for name, value in report.items()})
        super().log(logs, start_time)

    def _tail_of_evaluation(self) -> dict[str, float]:
        losses, self._eval_losses = self._eval_losses, []
        return feasible.tail_report(torch.cat(losses), self.multipliers.epsilon) if losses else {}

    # -- the optimizer ----------------------------------------------------------------------------------------------
    def create_optimizer(self, *args, **kwargs):
        """As [`~transformers.Trainer.create_optimizer`], with a weight decay of its own for the mask network."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made_before:
            return optimizer
        decay = getattr(self.rule, "weight_decay", None)
        if self.mask_network is None or decay is None:
            return optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            set_weight_decay(optimizer, list(self.mask_network.parameters()), decay)
        else:
            logger.warning(
                "%s makes its groups itself: the mask network has its weight decay.", type(optimizer).__name__
            )
        return optimizer


def set_weight_decay(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], decay: float) -> None:
    """Move parameters out of the groups of an optimizer that has made no step yet, into one with another weight decay."""
    chosen = {id(parameter) for parameter in parameters}
    like = None
    for group in optimizer.param_groups:
        kept = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if len(kept) < len(group["params"]):
            like, group["params"] = group, kept
    # A group that is empty and not the last loses its settings when torch loads a sharded optimizer.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if like is not None:
        rest = {key: value for key, value in like.items() if key not in ("params", "weight_decay")}
        optimizer.add_param_group(rest | {"params": parameters, "weight_decay": decay})
