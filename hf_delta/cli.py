"""The command `hf-delta`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hf_delta import __version__
from hf_delta.disk import finds_no_room
from hf_delta.errors import InputError
from hf_delta.paths import check_writable
from hf_delta.run.console import fail, no_room, unusable_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-delta`; returns the exit status: 0, 2 for bad input, 1 for a full disk, 130 for Ctrl-C."""
    try:
        arguments, rest = build_parser().parse_known_args(argv)
        if rest:
            # By the parser of the command, whose --help is the one to read.
            arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return arguments.command(arguments) or 0
    except InputError as error:
        return fail(error)
    except KeyboardInterrupt:
        # Where training has not begun to say what goes on from here, imports included.
        sys.stderr.write("Interrupted.\n")
        return 130
    except Exception as error:
        if (unusable := unusable_path(error)) is not None:
            return fail(unusable)
        if (reason := finds_no_room(error)) is None:
            raise
        return fail(no_room(error, reason, "give the command again"), status=1)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line as everything else that is wrong is said, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.rstrip('.')}. `{self.prog} --help` says what there is.")


def build_parser() -> argparse.ArgumentParser:
    """Commands import what they need when they run, so that `--help` imports neither torch nor transformers."""
    parser = _Parser(
        prog="hf-delta", description="Post-training methods that TRL and PEFT do not have.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hf_delta {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "train a recipe: check, train, evaluate, save")
    run.usage = "hf-delta run RECIPE [--key value ...]"
    run.epilog = "Every key of a recipe is a flag; `hf-delta keys RECIPE` lists those that a recipe can have."
    run.add_argument("recipe", help="a file, or a name that `hf-delta recipes` lists")
    run.set_defaults(print_help=run.print_help)
    rest = {"nargs": argparse.REMAINDER, "metavar": "--key value"}
    # argparse would ask for at least one in its message about a recipe that is missing.
    run.add_argument("overrides", **rest, help="keys of the recipe to change").required = False

    _command(commands, "recipes", _recipes, "list the recipes that come with hf_delta")

    keys = _command(commands, "keys", _keys, "list the keys that a recipe can have")
    keys.add_argument("trainer", help="sft, dpo or grpo, or a recipe")

    playground = _command(commands, "playground", _playground, "build a tiny model with data to try things on")
    playground.add_argument("--out", required=True, help="directory to build")
    playground.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    playground.add_argument(
        "--task", default="addition", help="task family, or the dotted path of one (default: %(default)s)"
    )

    _add_eval(commands)
    _add_export(commands)
    _add_pairs(commands)
    _add_push(commands)

    plot = _command(commands, "plot", _plot, "draw the curves of a run, and its token weights if it has any")
    plot.add_argument("run_dir", help="output_dir of a run")
    plot.add_argument("--out", help="picture to write, .png, .pdf or .svg (default: curves.png in RUN_DIR)")
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, function: Callable, help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
    parser.set_defaults(command=function, parser=parser)
    return parser


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "eval", _eval, "measure pass@k of a model, with confidence intervals")
    parser.add_argument("--model", required=True, help="model directory or hub id, or an adapter that names its base")
    parser.add_argument("--adapter", help="PEFT adapter to put on the model")
    parser.add_argument("--data", required=True, help="JSON lines with prompt, answer and, if there are any, level")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 8], help="each k of pass@k (default: 1 8)")
    parser.add_argument("--samples", type=int, help="answers per problem (default: the largest k)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--reward", default="playground_reward", help="reward function that judges, as in a recipe")
    parser.add_argument("--device", help="(default: cuda if there is one, else cpu)")
    parser.add_argument("--out", help="JSON report to write (default: eval.json beside the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace that report if it exists")


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "export", _export, "write an adapter as a plain LoRA for vLLM, or merged into its base"
    )
    parser.add_argument("--adapter", required=True, help="directory of the adapter")
    parser.add_argument("--base", help="directory or hub id of its base model (default: the one that it names)")
    parser.add_argument("--format", required=True, choices=["lora", "merged"], help="what to write")
    parser.add_argument("--out", required=True, help="directory to write; new, or empty")
    parser.add_argument(
        "--rank", type=int, help="lora: largest rank, rounded up to vLLM's list (default: the adapter's)"
    )
    parser.add_argument(
        "--max-error", type=float, help="lora: refuse if a module leaves out more of its change than this"
    )
    parser.add_argument(
        "--dora", action="store_true", help="lora: write DoRA and EDoRA exactly, which vLLM does not take"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32; merged: that of each weight)"
    )
    boolean = argparse.BooleanOptionalAction
    parser.add_argument(
        "--load-in-4bit", action=boolean, help="base was loaded so for training (default: see run.json)"
    )
    parser.add_argument(
        "--load-in-8bit", action=boolean, help="base was loaded so for training (default: see run.json)"
    )
    parser.add_argument("--bnb-4bit-quant-type", default="nf4", choices=["nf4", "fp4"], help="(default: %(default)s)")
    parser.add_argument("--use-bnb-nested-quant", action="store_true", help="the scales were quantised too")
    parser.add_argument("--push-to-hub", "--push_to_hub", metavar="REPO", help="upload the result to the Hub as well")
    _add_hub(parser)


def _add_push(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "push", _push, "upload a finished run, an adapter or a model to the Hub")
    parser.add_argument("directory", help="output_dir of a run, or a directory that save_pretrained or export wrote")
    parser.add_argument("--repo", help="where to (default: hub_model_id of the run, or the name of the directory)")
    parser.add_argument("--lora", action="store_true", help="an adapter as a plain LoRA too, in the folder lora/")
    parser.add_argument(
        "--run", metavar="DIR", help="run that it was exported from, for the card (default: directory)"
    )
    _add_hub(parser)


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-model-id",
        "--base_model_id",
        metavar="ID",
        help="what the base model is called on the Hub, if it is local",
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to (default: main)")


def _add_pairs(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "pairs", _pairs, "make preference pairs of the answers of two models, for DPO")
    parser.add_argument(
        "--strong", required=True, help="model whose answers are chosen: a directory or hub id, or an adapter"
    )
    parser.add_argument("--weak", required=True, help="model whose answers are rejected")
    parser.add_argument("--prompts", required=True, help="JSON lines with prompt; other columns are carried over")
    parser.add_argument(
        "--out", required=True, help="JSON lines to write; the same command continues an unfinished one"
    )
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="answers at a time (default: %(default)s)")
    parser.add_argument("--reward", help="reward function that judges the answers by `answer`, as in a recipe")
    parser.add_argument("--student", help="model to be trained: how likely does it find the answers?")
    parser.add_argument("--device", help="(default: cuda if there is one, else cpu)")


def _run(arguments: argparse.Namespace) -> int:
    # After the recipe everything is a key, and argparse no longer looks.
    if {"-h", "--help"}.intersection(arguments.overrides):
        arguments.print_help()
        return 0
    from hf_delta.train import main as train

    return train([arguments.recipe, *arguments.overrides])


def _recipes(arguments: argparse.Namespace) -> None:
    from hf_delta.recipe.find import list_recipes, shipped

    recipes = list_recipes()
    width = max(map(len, recipes), default=0)
    for name, summary in recipes.items():
        print(f"{name:<{width}}  {summary}")
    print(f"\nRecipes lie in {shipped('recipes')}")
    print(f"Configurations for accelerate launch lie in {shipped('accelerate_configs')}")


def _playground(arguments: argparse.Namespace) -> None:
    from hf_delta.playground import build_playground

    path = build_playground(arguments.out, seed=arguments.seed, task=arguments.task)
    print(f"Playground in {path}")


def _keys(arguments: argparse.Namespace) -> None:
    from hf_delta.recipe.keys import key_groups

    console = Console(highlight=False)
    for title, rows in key_groups(arguments.trainer).items():
        console.print(f"[bold]{title}[/bold]")
        for key, kind, default, meaning in rows:
            console.print(Text.assemble("  ", (key, "bold"), f": {kind}", f"; {default}" if default else ""))
            if meaning:
                console.print(Padding(Text(meaning, style="dim"), (0, 0, 0, 6)))


def _eval(arguments: argparse.Namespace) -> None:
    out = _report_path(arguments)
    from hf_delta.evaluation import evaluate_files
    from hf_delta.recipe.rewards import resolve_reward

    report = evaluate_files(
        arguments.model,
        arguments.data,
        adapter=arguments.adapter,
        ks=arguments.k,
        samples=max(arguments.k) if arguments.samples is None else arguments.samples,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        reward=resolve_reward(arguments.reward, key="--reward"),
        device=arguments.device,
    )
    report.save(out, overwrite=arguments.overwrite)
    Console().print(report.table())
    print(f"Report in {out}")


def _export(arguments: argparse.Namespace) -> None:
    from hf_delta.run.export import export

    export(arguments)


def _pairs(arguments: argparse.Namespace) -> None:
    from hf_delta.run.pairs import pairs

    pairs(arguments)


def _push(arguments: argparse.Namespace) -> None:
    from hf_delta.run.publish import push

    push(arguments)


def _report_path(arguments: argparse.Namespace) -> Path:
    """Where the report goes, refused before hours of sampling rather than after."""
    directory = Path(arguments.adapter or arguments.model)
    if arguments.out is None and not directory.is_dir():
        raise InputError(f"--out: {directory} is no directory here; say where the report is to go.")
    out = directory / "eval.json" if arguments.out is None else Path(arguments.out)
    check_writable(out, "--out", directory=False)
    if out.exists() and not arguments.overwrite:
        raise InputError(f"{out} exists: give another --out, or --overwrite.")
    return out


def _plot(arguments: argparse.Namespace) -> None:
    from hf_delta.plot import plot_pictures

    for name, path in plot_pictures(arguments.run_dir, arguments.out).items():
        print(f"{name} in {path}")


if __name__ == "__main__":
    sys.exit(main())
