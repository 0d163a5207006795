"""A plan as text."""

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_delta.plan.batch import computes_in
from hf_delta.plan.held import saved_states
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
    notes = [*_of_the_table(plan), *plan.notes]
    return Group(
        lines,
        Text(),
        memory_table(plan),
        *(Text(f"- {note}", style="dim") for note in notes),
        Text("Nothing was written."),
    )


def _of_the_table(plan: Plan) -> list[str]:
    notes = ["Parts are not all there at once: the peak is the largest sum of what is there at one moment."]
    if len(plan.estimates) > 1:
        notes.append("* is this launch; the others are what the same processes would have under another one.")
    return notes


def described(plan: Plan) -> dict[str, str]:
    """What would happen, in words, by name."""
    recipe = plan.recipe
    found = {
        "recipe": f"{_short(recipe.source)}, trainer {recipe.trainer}",
        "model": _model(plan),
        "trains": _trained(plan),
        "launch": _launch(plan),
        "data": _data(plan),
        "step": _step(plan),
        "steps": _steps(plan),
    }
    if recipe.trainer == "grpo":
        found["rollouts"] = _rollouts(plan)
    found |= {"saved": _saved(plan), "checkpoints": _checkpoints(plan)}
    if plan.lora_rank is not None:
        found["as LoRA"] = f"exported at its own rank it needs --max-lora-rank {plan.lora_rank} of vLLM"
    return found


def _short(path: str) -> str:
    """A path as it is seen from here."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _model(plan: Plan) -> str:
    text = plan.config.get_text_config()
    shape = f"{text.num_hidden_layers} layers of {text.hidden_size}, {text.vocab_size:,} words"
    return (
        f"{plan.recipe.model.model_name_or_path}: {plan.config.model_type}, {shape}; shapes from {_short(plan.shapes)}"
    )


def _trained(plan: Plan) -> str:
    weights, peft = plan.weights, plan.recipe.peft
    kind = {2: "16 bits", 4: "float32"}.get(weights.width, f"{8 * weights.width:.3g} bits")
    size_of = f"{size(weights.trained_bytes)} in {kind}"
    computed = computes_in(plan.recipe)
    computed = "" if computed is None else f"; computes in {str(computed).removeprefix('torch.')}"
    if peft is None:
        return f"all {weights.all:,} parameters, {size_of}{computed}"
    method = plan.recipe.values["peft_config"]["method"]
    share = weights.trained / weights.all
    frozen = size(weights.frozen_bytes + weights.buffer_bytes)
    return (
        f"{method}: {weights.trained:,} of {weights.all:,} parameters ({share:.2%}), {size_of}; "
        f"{frozen} are frozen{computed}"
    )


def _launch(plan: Plan) -> str:
    launch = plan.launch
    if launch.processes == 1:
        return f"1 process ({_short(launch.source)})"
    return f"{launch.processes} processes, {launch.strategy} ({_short(launch.source)})"


def _data(plan: Plan) -> str:
    data = plan.recipe.data
    files = data.train_file if isinstance(data.train_file, (str, type(None))) else ", ".join(data.train_file)
    rows = "rows not known" if plan.batches.rows is None else f"{plan.batches.rows:,} rows"
    return f"{files or data.dataset_name}: {rows}"


def _step(plan: Plan) -> str:
    per_step, batch = plan.batches.rows_per_step, plan.batch
    t = plan.recipe.training
    factors = f"{plan.launch.processes} processes" if plan.launch.processes > 1 else "1 process"
    factors += f" x {t.per_device_train_batch_size} at a time x {t.gradient_accumulation_steps}"
    answers = 1
    if plan.recipe.trainer == "grpo":
        what = f"{per_step:,} rollouts of {counted(per_step // t.num_generations, 'prompt')}"
    else:
        what = counted(per_step, "row")
        answers = batch.sequences // t.per_device_train_batch_size
    each = f"{batch.tokens:,} tokens" + (f" of each of {answers} answers with its prompt" if answers > 1 else " each")
    return f"{what} ({factors}); at most {each}, {per_step * answers * batch.tokens:,} in all"


def _steps(plan: Plan) -> str:
    found = plan.batches
    if found.steps is None:
        epochs = counted(plan.recipe.training.num_train_epochs, "epoch")
        return f"{epochs}, with a step for every {counted(found.rows_per_step, 'row')}"
    epochs = "" if found.epochs is None else f", {counted(found.epochs, 'epoch')}"
    goes_on = "" if plan.resumes is None else f", goes on from {plan.resumes}"
    return f"{found.steps:,}{epochs}{goes_on}"


def _rollouts(plan: Plan) -> str:
    found, t = plan.batches, plan.recipe.training
    made = "" if found.generations is None else f", {found.generations:,} times"
    prompts = counted(found.prompts_per_generation, "prompt")
    text = f"{found.rollouts_per_generation:,} at a time, {t.num_generations} for each of {prompts}{made}"
    text += f", of at most {t.max_completion_length:,} tokens"
    if not t.use_vllm:
        return f"{text}; with transformers, in the training processes"
    if t.vllm_mode == "server":
        return f"{text}; by a vLLM server elsewhere"
    return f"{text}; vLLM takes {t.vllm_gpu_memory_utilization:.0%} of each GPU"


def _saved(plan: Plan) -> str:
    recipe = plan.recipe
    kind = "adapter" if recipe.peft is not None else "model"
    files = f"{recipe.output_dir}: {kind} ({size(plan.final_bytes)}), tokenizer, run.json, README.md"
    if recipe.run.evaluate_pass_at is not None:
        files += ", eval_before.json, eval_after.json, report.md"
    return files


def _checkpoints(plan: Plan) -> str:
    training = plan.recipe.training
    strategy = str(getattr(training.save_strategy, "value", training.save_strategy))
    if strategy == "no":
        return "none"
    one = plan.final_bytes + saved_states(plan.step, plan.launch.strategy if plan.launch.processes > 1 else "DDP")
    how_often = _how_often(strategy, training.save_steps)
    if plan.checkpoints is None:
        return f"{size(one)} {how_often}"
    stay = f"{plan.checkpoints} stay" if plan.checkpoints > 1 else "1 stays"
    return f"{size(one)} {how_often}; {stay}, {size(plan.checkpoints * one)} in all"


def _how_often(strategy: str, steps: float) -> str:
    if strategy != "steps":
        return f"every {strategy}"
    return (
        f"every {steps:.0%} of the steps" if steps < 1 else "every step" if steps == 1 else f"every {steps:,.0f} steps"
    )


def counted(number: float, noun: str) -> str:
    """A number with its noun: `1 epoch`, `2.5 epochs`, `1,024 rows`."""
    text = f"{number:,.0f}" if number == int(number) else f"{number:.3g}"
    return f"{text} {noun}" + ("" if text == "1" else "s")


def memory_table(plan: Plan) -> Table:
    """Bytes on a process for every strategy; the one of the launch is marked."""
    what = "the process" if plan.recipe.training.use_cpu else "each GPU"
    table = Table(title=f"Memory of {what}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.show_header = len(plan.estimates) > 1
    table.add_column("", no_wrap=True)
    for strategy in plan.estimates:
        table.add_column(_heading(strategy, plan), justify="right", no_wrap=True)
    for name in _PARTS:
        values = [getattr(found, name) for found in plan.estimates.values()]
        if any(values):
            table.add_row(name, *map(size, values), style="bold" if name == "peak" else None)
    table.add_row("peak is in", *(found.moment for found in plan.estimates.values()))
    return table


def _heading(strategy: str, plan: Plan) -> str:
    name = f"{strategy}, no sharding" if strategy == "DDP" else strategy
    return f"{name} *" if strategy == plan.launch.strategy else name


def size(number: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.0f} {_UNITS[unit]}" if unit == 0 or number >= 100 else f"{number:.3g} {_UNITS[unit]}"
