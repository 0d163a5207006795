"""A plan as text."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_delta.plan.memory import state_bytes
from hf_delta.plan.run import Plan


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_PARTS = ("weights", "reference", "optimizer", "gradients", "activations", "head", "rollouts", "peak")


def show(plan: Plan, console: Console) -> None:
    """Print a plan."""
    console.print(render(plan))


def render(plan: Plan) -> RenderableType:
    """Lines of what would happen, a table of memory, and notes."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, text in described(plan).items():
        lines.add_row(name, Text(text))
    notes = [Text(f"- {note}", style="dim") for note in plan.notes]
    return Group(lines, Text(), memory_table(plan), *notes, Text("Nothing was written."))


def described(plan: Plan) -> dict[str, str]:
    """What would happen, in words, by name."""
    recipe, config = plan.recipe, plan.config
    text = config.get_text_config()
    found = {
        "recipe": f"{recipe.source}: trainer {recipe.trainer}",
        "model": f"{recipe.model.model_name_or_path}: {config.model_type}, {text.num_hidden_layers} layers of "
        f"{text.hidden_size}, {text.vocab_size:,} words; shapes from {plan.shapes}",
        "trains": _trained(plan),
        "launch": f"{plan.launch.processes} process{'es' * (plan.launch.processes > 1)}, {plan.launch.strategy} ({plan.launch.source})",
        "data": _data(plan),
        "step": _step(plan),
        "steps": _steps(plan),
        **({"rollouts": _rollouts(plan)} if recipe.trainer == "grpo" else {}),
        "saved": _saved(plan),
    }
    if plan.lora_rank is not None:
        found["as LoRA"] = f"exported, max_lora_rank of vLLM is {plan.lora_rank}"
    return found


def _trained(plan: Plan) -> str:
    weights, peft = plan.weights, plan.recipe.peft
    if peft is None:
        return f"all {weights.all:,} parameters ({size(weights.bytes)})"
    method = plan.recipe.values["peft_config"]["method"]
    share = weights.trained / weights.all
    return f"{method}: {weights.trained:,} of {weights.all:,} parameters ({share:.2%}, {size(weights.trained_bytes)})"


def _data(plan: Plan) -> str:
    data = plan.recipe.data
    files = data.train_file if isinstance(data.train_file, (str, type(None))) else ", ".join(data.train_file)
    rows = "rows not known" if plan.batches.rows is None else f"{plan.batches.rows:,} rows"
    return f"{files or data.dataset_name}: {rows}"


def _step(plan: Plan) -> str:
    per_step, batch = plan.batches.rows_per_step, plan.batch
    t = plan.recipe.training
    sizes = f"{plan.launch.processes} x {t.per_device_train_batch_size} x {t.gradient_accumulation_steps}"
    if plan.recipe.trainer == "grpo":
        what = f"{per_step:,} rollouts of {per_step // t.num_generations:,} prompts"
        tokens = per_step * batch.tokens
    else:
        what = f"{per_step:,} rows"
        tokens = per_step * batch.tokens * batch.sequences // t.per_device_train_batch_size
    return f"{what} ({sizes}); at most {tokens:,} tokens, {batch.tokens:,} each"


def _steps(plan: Plan) -> str:
    found = plan.batches
    if found.steps is None:
        return f"{plan.recipe.training.num_train_epochs:g} epochs: one step for every {found.rows_per_step:,} rows"
    epochs = "" if found.epochs is None else f", {found.epochs:.3g} epochs"
    goes_on = "" if plan.resumes is None else f", goes on from {plan.resumes}"
    return f"{found.steps:,}{epochs}{goes_on}"


def _rollouts(plan: Plan) -> str:
    found, t = plan.batches, plan.recipe.training
    made = "" if found.generations is None else f", {found.generations:,} times"
    text = f"{found.rollouts_per_generation:,} at a time, {t.num_generations} for each of {found.prompts_per_generation:,} prompts{made}"
    if not t.use_vllm:
        return f"{text}; with transformers, in the training processes"
    if t.vllm_mode == "server":
        return f"{text}; by a vLLM server elsewhere"
    return f"{text}; vLLM takes {t.vllm_gpu_memory_utilization:.0%} of each GPU"


def _saved(plan: Plan) -> str:
    recipe, weights = plan.recipe, plan.weights
    kind = "adapter" if recipe.peft is not None else "model"
    final = weights.trained_bytes if recipe.peft is not None else weights.bytes
    each = final + state_bytes(plan.step.optimizer, weights.trained, weights.width)
    count = "checkpoints" if plan.checkpoints is None else f"{plan.checkpoints} checkpoints"
    lines = f"{recipe.output_dir}: {kind} ({size(final)}), run.json, README.md; {count} of {size(each)}"
    if recipe.run.evaluate_pass_at is not None:
        lines += "; eval_before.json, eval_after.json, report.md"
    return lines


def memory_table(plan: Plan) -> Table:
    """Bytes on a process for every strategy; the one of the launch is marked."""
    what = "of the process" if plan.recipe.training.use_cpu else "of each GPU"
    table = Table(title=f"Memory {what}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for strategy in plan.estimates:
        chosen = strategy == plan.launch.strategy and len(plan.estimates) > 1
        table.add_column(f"{strategy} *" if chosen else strategy, justify="right", no_wrap=True)
    for name in _PARTS:
        values = [getattr(found, name) for found in plan.estimates.values()]
        if any(values):
            table.add_row(name, *map(size, values), style="bold" if name == "peak" else None)
    table.add_row("at its most in", *(found.moment for found in plan.estimates.values()))
    return table


def size(number: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.0f} {_UNITS[unit]}" if unit == 0 or number >= 100 else f"{number:.3g} {_UNITS[unit]}"
