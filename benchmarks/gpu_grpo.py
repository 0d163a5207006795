"""Steps of GRPO for `gpu.py`: `DeltaGRPOTrainer` with everything on beside TRL's trainer, on the same rows."""

import gc
from functools import partial

from datasets import Dataset
from gpu_rows import Comparison
from gpu_setup import Setup
from models import METHODS, switched, word_tokenizer
from overhead import TRAINERS
from timing import Case, Stopwatch, inside
from transformers import PrinterCallback, TrainerCallback


GENERATIONS = 8
# Names as in `overhead.TRAINERS`, and whether rollouts are merged.
WAYS = {"TRL": ("trl", False), "hf_delta": ("everything", False), "hf_delta, merged_rollouts": ("everything", True)}


class StepSeconds(TrainerCallback):
    """Seconds of every step, from its first batch, which generates, to the optimizer."""

    def __init__(self, device: str):
        self.watch, self.seconds = Stopwatch(device), []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.watch.start()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(self.watch.stop())


def grpo(setup: Setup) -> list[Comparison]:
    completions, _ = setup.scale.grpo
    new = setup.scale.rollout[2]
    what = f"{completions} completions of {new} tokens"
    return [
        Comparison(
            "grpo",
            f"GRPO step with LoRA, {what}",
            "TRL",
            {way: partial(_step, setup, way, "LoRA") for way in WAYS},
        ),
        Comparison(
            "grpo",
            f"GRPO step with DoRA, {what}",
            "TRL with DoRA of PEFT",
            {
                "TRL with DoRA of PEFT": partial(_step, setup, "TRL", "DoRA of PEFT"),
                "hf_delta with fast DoRA": partial(_step, setup, "hf_delta", "fast DoRA"),
                "hf_delta with fast DoRA, merged_rollouts": partial(
                    _step, setup, "hf_delta, merged_rollouts", "fast DoRA"
                ),
            },
        ),
    ]


def parity(completion_ids, **_) -> list[float]:
    """A reward that costs nothing and differs within groups."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def _step(setup: Setup, way: str, method: str) -> Case:
    """The second step of a new trainer; the first one is its warm-up."""
    state = {}

    def before():
        clock = StepSeconds(setup.device)
        state.update(clock=clock, trainer=_trainer(setup, way, method, clock))

    def after():
        state.clear()
        # Trainers refer to themselves in circles.
        gc.collect()

    case = Case(
        run=lambda: state["trainer"].train(),
        before=before,
        after=after,
        seconds=lambda: state["clock"].seconds[1],
        cold=True,
    )
    return inside(case, lambda: switched(method))


def _trainer(setup: Setup, way: str, method: str, clock: StepSeconds):
    name, merged = WAYS[way]
    trainer_class, config_class, changes = TRAINERS[name]
    completions, rows = setup.scale.grpo
    new = setup.scale.rollout[2]
    arguments = config_class(
        output_dir=str(setup.folder / "grpo"),
        max_steps=2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=completions // rows,
        num_generations=GENERATIONS,
        max_completion_length=new,
        # Every completion is as long as it can be, so that all trainers have the same work.
        generation_kwargs={"min_new_tokens": new},
        gradient_checkpointing=False,
        bf16=setup.device == "cuda",
        use_cpu=setup.device == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
        **({"merged_rollouts": True} if merged else {}),
    )
    trainer = trainer_class(
        setup.shared_base(),
        parity,
        arguments,
        prompts(2 * completions // GENERATIONS, setup.scale.rollout[1]),
        processing_class=word_tokenizer(),
        peft_config=METHODS[method][0](setup.sizes),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def prompts(number: int, length: int) -> Dataset:
    """Different prompts of `length` tokens: the number of each in binary, with the letters a and b."""
    bits = [format(i, f"0{length}b")[-length:] for i in range(number)]
    texts = [" ".join("ab"[int(bit)] for bit in row) for row in bits]
    return Dataset.from_list([{"prompt": text, "level": f"{i % 2}"} for i, text in enumerate(texts)])
