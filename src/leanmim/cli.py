"""The command line: a table, command -> (help, configuration, function)."""

import sys
from collections.abc import Iterator
from copy import copy
from importlib import import_module
from typing import Any, NamedTuple

import tyro

from leanmim.config import Cost, Export, Knn, Plan, Pretrain, Probe, Report, Show
from leanmim.errors import UserError
from leanmim.recipes import RECIPES
from leanmim.version import __version__


class Command(NamedTuple):
    """A row of the table; the function is imported when it is called."""

    help: str
    config: Any
    function: str


def recipes() -> Any:
    """One subcommand for each recipe, its values as defaults; data and out must be given."""
    ask = {name: copy(recipe) for name, recipe in RECIPES.items()}
    for recipe in ask.values():
        for name in ("data", "out"):
            object.__setattr__(recipe, name, tyro.MISSING)  # replace() would pass it to __init__, which wants a str
    return tyro.extras.subcommand_type_from_defaults(ask, DESCRIPTIONS, prefix_names=False)


DESCRIPTIONS = {
    "mae": "Masked autoencoder: drop 75 % of the patches, reconstruct them (ViT).",
    "fastmim": "FastMIM: low resolution, masks painted on the image, HOG as target (any backbone).",
    "fastmim-p": "FastMIM-P: FastMIM with a resolution that grows during training.",
    "pr-mim": "PR-MIM: the decoder sees a third of the masked patches, the others are filled in (ViT).",
    "bim": "BIM: four segments, each trained by a decoder and loss of its own; activations and gradients of one at a time (ViT).",
    "simmim": "SimMIM: a learned token in masked squares, one linear layer (ViT, Swin).",
}
COMMANDS = {
    "pretrain": Command("pre-train a backbone on a folder of images", Pretrain, "train.pretrain.pretrain"),
    "cost": Command("what a training step of a recipe costs, counted beforehand", Cost, "costs.cost"),
    "plan": Command("what fits the memory, how long it takes, the command to run", Plan, "planner.plan"),
    "knn": Command("k-nearest-neighbour accuracy of a run on labelled images", Knn, "evaluate.knn.knn"),
    "probe": Command("linear-probe accuracy of a run on labelled images", Probe, "evaluate.probe.probe"),
    "show": Command("draw original, masked image, reconstruction", Show, "pictures.show"),
    "export": Command("write a run's weights for timm or transformers", Export, "formats.export"),
    "report": Command("one HTML page about one or several runs", Report, "page.report"),
}
RESUMABLE = {"pretrain", "probe"}
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
HELP = "usage: leanmim COMMAND ... (each has --help)\n\n" + "\n".join(
    f"  {name:10}{command.help}" for name, command in COMMANDS.items()
)


def main(arguments: list[str] | None = None) -> None:
    """Parse, call, print. A mistake of the user's ends with one message and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP)
        return
    if arguments[:1] == ["--version"]:
        print(__version__)
        return
    if not arguments or arguments[0] not in COMMANDS:
        wrong = f"there is no command {arguments[0]!r}" if arguments else "give a command"
        print(f"leanmim: {wrong}\n\n{HELP}", file=sys.stderr)
        raise SystemExit(2)
    name, *rest = arguments
    for word in rest:
        option = word.partition("=")[0].replace("_", "-")
        if new := RENAMED.get(name, {}).get(option):
            print(f"leanmim: {option} is called {new} now", file=sys.stderr)
            raise SystemExit(2)
    command = COMMANDS[name]
    kind = recipes() if command.config is Pretrain else command.config
    config = tyro.cli(kind, args=rest, prog=f"leanmim {name}", config=(tyro.conf.OmitArgPrefixes,))
    module, _, function = command.function.rpartition(".")
    try:
        result = getattr(import_module(f"leanmim.{module}"), function)(config)
        if isinstance(result, Iterator):
            for what, value in result:
                print(f"{what}: {100 * value:.2f} %")
        elif name != "pretrain":
            print(result)
    except UserError as error:
        print(f"leanmim: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        text = str(stop) or "interrupted"
        if name in RESUMABLE:
            text += "; the same command continues from the last checkpoint, if one was written"
        print(f"leanmim: {text}", file=sys.stderr)
        raise SystemExit(128 + getattr(stop, "number", 2)) from None
