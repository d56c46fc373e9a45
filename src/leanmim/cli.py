"""The command line: a table, command -> (help, configuration, function)."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from io import TextIOWrapper
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn

from leanmim.arguments import parse_arguments
from leanmim.completion import print_completion
from leanmim.config import (
    Compare,
    Cost,
    Embed,
    Evaluate,
    Export,
    Finetune,
    Knn,
    Pack,
    Plan,
    Predict,
    Pretrain,
    Probe,
    Publish,
    Report,
    Show,
    Stats,
)
from leanmim.errors import UserError
from leanmim.recipes import LEAN, RECIPES, nearest
from leanmim.signals import stoppable
from leanmim.version import __version__


class Command(NamedTuple):
    """A row of the table; the function is imported when it is called."""

    help: str
    config: Any
    function: str
    recipes: Mapping[str, Pretrain] = {}
    """By name, if the name of one must follow the command; its values are the defaults."""


DESCRIPTIONS = {
    "mae": "Masked autoencoder: drop 75 % of the patches, reconstruct them (ViT).",
    "fastmim": "FastMIM: low resolution, masks painted on the image, HOG as target (any backbone).",
    "fastmim-p": "FastMIM-P: FastMIM with a resolution that grows during training.",
    "pr-mim": "PR-MIM: the decoder sees a third of the masked patches, the others are filled in (ViT).",
    "bim": "BIM: four segments, each trained by a decoder and loss of its own; activations and gradients of one at a time (ViT).",
    "lean": f"Ours, for little time: MAE at {LEAN.input_size[0]} px with a decoder of one layer (ViT).",
    "lean-memory": "Ours, for little memory: lean in four segments, one at a time on the GPU, half of the patches thrown (ViT).",
    "simmim": "SimMIM: a learned token in masked squares, one linear layer (ViT, Swin).",
}
COMMANDS = {
    "pretrain": Command("pre-train a backbone on a folder of images", Pretrain, "train.pretrain.pretrain", RECIPES),
    "pack": Command("shrink every image once, into one file that --data takes", Pack, "data.pack.pack"),
    "stats": Command("mean and standard deviation of images, to normalise them by", Stats, "data.stats.stats"),
    "finetune": Command("fine-tune it to a classifier of labelled images", Finetune, "classifier.finetune.finetune"),
    "predict": Command("classify images with a fine-tuned run, to a CSV file", Predict, "classifier.predict.predict"),
    "embed": Command("features of images, to an .npy or .parquet file", Embed, "evaluators.embed.embed"),
    "cost": Command("what a training step of a recipe costs, counted beforehand", Cost, "costs.cost"),
    "plan": Command("what fits the memory, how long it takes, the command to run", Plan, "planner.plan"),
    "compare": Command(
        "pre-train recipes under one budget, one page of what is worth it", Compare, "comparison.compare"
    ),
    "evaluate": Command(
        "all measures of a frozen encoder on labelled images", Evaluate, "evaluators.evaluate.evaluate"
    ),
    "knn": Command("k-nearest-neighbour accuracy of a run on labelled images", Knn, "evaluators.knn.knn"),
    "probe": Command("linear-probe accuracy of a run on labelled images", Probe, "evaluators.probe.probe"),
    "show": Command("draw reconstructions, features, attention, neighbours, a map", Show, "pictures.show"),
    "export": Command("write a run's weights for timm, transformers or ONNX", Export, "formats.export"),
    "publish": Command("export for timm, and push to the Hugging Face hub", Publish, "formats.publish.publish"),
    "report": Command("one HTML page about one or several runs", Report, "page.report"),
}
NARROWEST = 40  # columns; help of one column is never done
WIDEST = 120  # columns of a help page; from 130 on tyro sets groups side by side, and their order is lost
RESUMABLE = {"compare", "pretrain", "pack", "finetune", "embed", "probe"}
SWITCHES = {"--compile", "--channels-last", "--cuda-graph"}
RENAMED = {  # options of earlier versions
    "pretrain": {f"--stage-{name}": f"--phase-{name}" for name in ("scales", "starts", "batches", "accums", "blrs")},
    "show": {"--block": "--segment"},
    "cost": {
        f"--{name}": f"RECIPE:{name}=VALUE"
        for name in (
            "masking",
            "mask-ratio",
            "segments",
            "offload",
            "depth",
            "target",
            "decoder-depth",
            "decoder-width",
            "decoder-heads",
            "throw",
            "fill",
        )
    },
}


def choose(words: list[str], usage: str, what: str, table: Mapping[str, str]) -> str:
    """The first word, a name in the table; or print the table and exit."""
    column = max(map(len, table)) + 1
    lines = [f"  {name:{column}}{text}" for name, text in table.items()]
    help = "\n".join([f"usage: {usage} ... (each has --help)", "", *lines])
    if words[:1] in (["-h"], ["--help"]):
        print(help)
        raise SystemExit(0)
    if words and words[0] in table:
        return words[0]
    wrong = f"there is no {what} {words[0]!r}; {nearest(words[0], table)}" if words else f"give a {what}"
    if words and words[0].startswith("-"):
        wrong = f"give a {what} before {words[0]}"
    print(f"leanmim: {wrong}\n\n{help}", file=sys.stderr)
    raise SystemExit(2)


def switched(words: list[str]) -> Iterator[str]:
    """The words, with True or False after a switch that may also be auto, where it stands alone."""
    for word, following in zip_longest(words, words[1:]):
        option = word.replace("_", "-")
        if option in SWITCHES:
            yield from (option,) if following in ("True", "False", "auto") else (option, "True")
        elif (yes := option.replace("--no-", "--", 1)) in SWITCHES:
            yield from (yes, "False")
        else:
            yield word


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The name of the command, and its configuration. Exit with a message if there is something wrong."""
    name = choose(arguments, "leanmim COMMAND", "command", {name: command.help for name, command in COMMANDS.items()})
    command, rest, prog = COMMANDS[name], arguments[1:], f"leanmim {name}"
    for word in rest:
        option = word.partition("=")[0].replace("_", "-")
        if new := RENAMED.get(name, {}).get(option):
            raise UserError(f"{option} is called {new} now")
    rest = list(switched(rest))
    about, defaults = None, {}
    if command.recipes:
        table = {name: DESCRIPTIONS.get(name, "") for name in command.recipes}
        recipe = choose(rest, f"{prog} RECIPE", "recipe", table)
        prog, rest, about = f"{prog} {recipe}", rest[1:], table[recipe]
        given = command.recipes[recipe]
        defaults = {own.name: getattr(given, own.name) for own in fields(given) if own.name not in given.LEFT_EMPTY}
    return name, parse_arguments(command.config, rest, prog, about, defaults)


def end(message: str, code: int) -> NoReturn:
    """Say why, and exit."""
    print(f"leanmim: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def main(arguments: list[str] | None = None) -> None:
    """Parse, call, print. A mistake of the user's or a fault of the machine ends with one message and exit code 2; a reader of
    the output that goes away, as `head` does, with 141.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # the name of a file need not be text, and the terminal may know ASCII only
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    columns = shutil.get_terminal_size().columns
    if columns < NARROWEST or (columns > WIDEST and not {"-h", "--help"}.isdisjoint(arguments)):
        os.environ["COLUMNS"] = str(min(max(columns, NARROWEST), WIDEST))
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python says so again when it ends
        raise SystemExit(141) from None


def run(arguments: list[str]) -> None:
    """`main` without care for the output."""
    name = ""
    try:
        os.getcwd()  # torch ends the process without a word of use where this folder was removed
        if arguments[:1] == ["--version"]:
            print(__version__)
            return
        if arguments[:1] == ["--print-completion"]:
            print_completion(arguments[1:], COMMANDS)
        name, config = parse(arguments)
        module, _, function = COMMANDS[name].function.rpartition(".")
        with stoppable():
            result = getattr(import_module(f"leanmim.{module}"), function)(config)
            if isinstance(result, Iterator):
                for what, value in result:
                    print(f"{what}: {value}", flush=True)
            elif name not in ("pretrain", "finetune"):  # they have told already
                print(result)
    except UserError as error:
        end(str(error), 2)
    except BrokenPipeError:
        raise
    except OSError as error:  # of a disk, a network drive, a folder that was removed
        end(f"{error}; see that it can be read or written, and give the same command again", 2)
    except KeyboardInterrupt as stop:
        text = str(stop) or "interrupted"
        if name in RESUMABLE:
            text += "; the same command continues from the last checkpoint, if one was written"
        end(text, 128 + getattr(stop, "number", 2))
