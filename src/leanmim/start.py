"""What fine-tuning, probing and embedding start from: a run, weights of timm's, or nothing."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmim.checkpoint import architecture, is_ours
from leanmim.config import Embed, Evaluator, Finetune, Pretrain
from leanmim.config.base import Images, Model, Stored, as_read
from leanmim.data import IMAGENET
from leanmim.encoders.backbone import Backbone, backbone_of, check_name, full_depth, shallower
from leanmim.errors import UserError
from leanmim.published import published_model
from leanmim.run import Run, load
from leanmim.weights import check_shapes, digest, fit_backbone, load_backbone, read_weights, rebuild, truncated

SCRATCH = "scratch"
TAKES = (
    "a run folder, an export folder or local-dir:FOLDER, a checkpoint file of timm (with --model), timm's name of published "
    "weights as vit_small_patch16_224.augreg_in21k, hf-hub:OWNER/NAME, or scratch (with --model)"
)


@dataclass(frozen=True)
class Start:
    """An encoder: its architecture, its weights, and the statistics of the images it knows."""

    model: Model
    """Architecture, input size and channels; the model as a whole, also where only its first layers were trained."""
    weights: dict[str, Tensor] | None
    """By timm's names, at their own input size, without a head that is asked for; None is a random initialisation."""
    mean: list[float]
    std: list[float]
    origin: str
    """For people to read."""
    pretrained: Pretrain | None = None
    """Of a pre-training run: its configuration."""
    checkpoint: Path | None = None
    """Of a pre-training run: the file."""
    step: int = 0
    """Of a run: its last step."""
    depth: int | None = None
    """Blocks or stages that were asked for; None is all."""
    masked: bool = False
    """Whether masked image modelling, or nothing, made the encoder: what pools its tokens is then yet to be learned."""
    crop: float | None = None
    """Share of the resized image's side that evaluation keeps; None is the usual one (`leanmim.data.centre_crop`)."""
    classes: tuple[str, ...] = ()
    """Of a fine-tuned run or an exported classifier: what its head tells apart."""

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        return digest(self.weights or {})

    def encoder(self, input_size: tuple[int, int] | None = None, seed: int = 0) -> Backbone:
        """The timm model without head, in evaluation mode.

        Args:
            input_size: height and width, px; None is the start's own.
            seed: of a random initialisation.
        """
        size = input_size or self.model.size
        if self.checkpoint:
            return load_backbone(self.checkpoint, size, self.depth)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            backbone = backbone_of(replace(self.model, input_size=size))
        if self.weights is not None:
            fit_backbone(backbone, self.weights, self.origin)
        return backbone.eval()


def open_start(
    start: str,
    model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    input_size: tuple[int, ...] = (),
    images: Images | None = None,
    depth: int | None = None,
) -> Start:
    """The encoder that a START names.

    Args:
        start: what `TAKES` says.
        model: timm's name of the architecture; for a checkpoint file and scratch.
        model_kwargs: further arguments of the architecture; for the same two.
        input_size: px, one or two numbers; empty is the start's own.
        images: their channels, values, mean and standard deviation; None is all of the start's own.
        depth: only so many blocks or stages: of a run, up to the end of a segment.

    Raises:
        UserError: there is no such start, it cannot be read, or it needs (or does not take) an option.
    """
    images = images or Images()
    path = Path(start.removeprefix("local-dir:"))
    # without --model it can only be leanmim's: `load` says what is wrong with it
    foreign = is_foreign(path) and (path.suffix != ".pt" or model is not None)
    if start == SCRATCH or foreign:
        found = of_architecture(start, model, model_kwargs or {}, input_size, images)
    elif model or model_kwargs:
        raise UserError(f"{start!r} has an architecture of its own: leave --model and --model-kwargs out")
    elif (checkpoint := checkpoint_of(path)) is not None:
        found = of_checkpoint(checkpoint, depth)
    elif path.is_dir():
        found = of_export(path)
    else:
        found = of_published(start, images)
    check_images(found, images)
    if depth is not None and found.pretrained is None:
        found = cut(found, depth)
    return replace(found, model=replace(found.model, input_size=input_size)) if input_size else found


def is_foreign(path: Path) -> bool:
    """Whether it is a checkpoint file of timm's, which says nothing of the architecture."""
    return path.is_file() and not is_ours(path)


def known_of(images: Images) -> dict[str, Any]:
    """Channels and values of the images for a start that knows none; three channels if they are not given."""
    return {"channels": images.channels or 3, "values": images.values}


def statistics_of(images: Images, start: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation for a start that knows none: those given, or ImageNet's.

    Raises:
        UserError: none are given for stored values.
    """
    if images.mean is not None and images.std is not None:
        return list(images.mean), list(images.std)
    channels = images.channels or 3
    if isinstance(as_read(channels, images.values), Stored):
        raise UserError(
            f"{start!r} says nothing of the mean and deviation of stored values; measure them with "
            f"`leanmim stats --data DATA --channels {channels} --out stats.json`, and give --stats stats.json"
        )
    mean, std = IMAGENET[channels]
    return list(mean), list(std)


def check_images(found: Start, images: Images) -> None:
    """Raise UserError for options that say something else of the images than the start does."""
    own = found.model
    if images.channels is not None and images.channels != own.channels:
        raise UserError(f"--channels {images.channels}: {found.origin} has {own.channels}; leave --channels out")
    stored = isinstance(own.read_as, Stored)
    if images.values not in ("auto", own.values, "stored" if stored else "8-bit"):
        raise UserError(f"--values {images.values}: {found.origin} was trained with others; leave --values out")


def start_of(name: str, config: Finetune | Evaluator | Embed) -> Start:
    """The start that a command is given, with the command's options; errors as for `open_start`, and for a mean or deviation of
    images that the start knows otherwise.
    """
    found = open_start(name, config.model, config.model_kwargs, config.input_size, config, config.depth)
    if config.mean is not None and (list(config.mean), list(config.std or ())) != (found.mean, found.std):
        raise UserError(f"--mean and --std: {found.origin} has its own; leave them, or --stats, out")
    return found


def images_of(start: Start) -> Images:
    """What another start may not know of the images that this one takes."""
    own = Images(channels=start.model.channels, values=start.model.values)
    known = isinstance(start.model.read_as, Stored)
    return replace(own, mean=tuple(start.mean), std=tuple(start.std)) if known else own


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint of leanmim in a run folder, or the one that the path names; None if it is no run."""
    if path.is_file():
        return path if is_ours(path) or path.suffix == ".pt" else None
    return next((file for file in (Run(path).best, Run(path).last) if file.is_file()), None)


def of_architecture(
    start: str,
    model: str | None,
    model_kwargs: dict[str, Any],
    input_size: tuple[int, ...],
    images: Images,
) -> Start:
    """A random initialisation, or a checkpoint file of timm's."""
    if not model:
        raise UserError(f"{start!r} says nothing of the architecture: give --model, timm's name of it")
    check_name(model)
    own = Model(model=model, model_kwargs=model_kwargs, input_size=input_size or (224,), **known_of(images))
    weights = None if start == SCRATCH else read_weights(Path(start), repr(start))
    mean, std = statistics_of(images, start)
    origin = f"{model}, random initialisation" if weights is None else start
    return Start(own, weights, mean, std, origin, masked=weights is None)


def of_checkpoint(path: Path, depth: int | None) -> Start:
    """A run of leanmim, of pre-training or of fine-tuning."""
    state = load(path)
    mean, std, step = state["mean"], state["std"], state["step"]
    if "classes" in state:
        own, weights, classes = architecture(state), state.get("average") or state["model"], tuple(state["classes"])
        check_shapes(backbone_of(own, device="meta", num_classes=len(classes)), weights, str(path))
        crop = Finetune.from_json(state["config"]).crop
        return Start(own, weights, mean, std, f"{path}, fine-tuned", step=step, crop=crop, classes=classes)
    folder = path.parent.parent if path.parent.name == "checkpoints" else None
    config, mim = rebuild(state, str(folder or path))
    own = Model(
        model=config.model, model_kwargs=config.model_kwargs, input_size=config.input_size, channels=config.channels,
        values=config.values,
    )  # fmt: skip
    backbone = truncated(mim.encoder, config, depth)
    if depth is not None and depth < full_depth(backbone_of(own, device="meta")):
        own = replace(own, model_kwargs=own.model_kwargs | shallower(mim.encoder.backbone, depth))
    whole: Backbone = getattr(backbone, "backbone", backbone)
    weights = whole.state_dict()
    origin = f"{folder or path}, {config.recipe}, {step} steps" + (f", depth {depth}" if depth else "")
    return Start(own, weights, mean, std, origin, config, path, step, depth, True)


def of_export(folder: Path) -> Start:
    """A folder with timm's config.json and weights: what `leanmim export` and timm write."""
    file = folder / "config.json"
    if Run(folder).stored().keys() & {"out"}:
        Run(folder).read()  # a run without a checkpoint: it says so
    if not file.is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{str(folder)!r} is neither a run folder with a checkpoint (checkpoints/last.pt) nor an export folder "
            f"(config.json, model.safetensors); give {TAKES}"
        )
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        name, known = described["architecture"], described["pretrained_cfg"]
        channels, *size = known["input_size"]
        mean, std = list(known["mean"]), list(known["std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(file)!r} is not timm's description of a model ({type(error).__name__}: {error})"
        ) from error
    arguments = {
        key: value for key, value in described.get("model_args", {}).items() if key not in ("img_size", "in_chans")
    }
    if name.startswith("swin_"):  # a window by our own rule follows the input size
        ruled = [max(1, side // arguments.get("patch_size", 4) // 8) for side in size]
        given = arguments.get("window_size")
        if given is not None and given in (ruled, ruled[0] if ruled[0] == ruled[-1] else None):
            arguments.pop("window_size")
    values = described.get("leanmim", {}).get("values", "auto")
    own = Model(model=name, model_kwargs=arguments, input_size=tuple(size), channels=channels, values=values)
    classes = described.get("label_names") or known.get("label_names") or ()
    weights = read_weights(folder / "model.safetensors", repr(str(folder)))
    masked = "leanmim" in described and not classes
    crop = known.get("crop_pct") if classes else None
    return Start(own, weights, mean, std, str(folder), masked=masked, crop=crop, classes=tuple(classes))


def of_published(name: str, images: Images) -> Start:
    """Published weights of timm's."""
    backbone, name = published_model(name, images.channels or 3, "")
    known: Any = backbone.pretrained_cfg
    own = Model(model=known["architecture"], input_size=tuple(known["input_size"][1:]), **known_of(images))
    own_colours = own.channels == 3 and not isinstance(own.read_as, Stored) and images.mean is None
    mean, std = (list(known["mean"]), list(known["std"])) if own_colours else statistics_of(images, name)
    tag = name.rpartition(".")[2]  # as mae, fcmae; with ft_in1k those that labels have fine-tuned since
    masked = "mae" in tag and "_ft_" not in tag
    return Start(own, backbone.state_dict(), mean, std, name, masked=masked)


def cut(start: Start, depth: int) -> Start:
    """Only the first blocks or stages of weights that are not a run's."""
    whole = backbone_of(start.model, device="meta")
    if not 0 < depth <= (most := full_depth(whole)):
        raise UserError(f"--depth {depth} is out of range; {start.model.model} has {most} blocks or stages")
    arguments = shallower(whole, depth)
    if not arguments:
        raise UserError(f"--depth {depth}: timm does not build {start.model.model} shorter; leave --depth out")
    own = replace(start.model, model_kwargs=start.model.model_kwargs | arguments)
    keys = backbone_of(own, device="meta").state_dict().keys()
    weights = None if start.weights is None else {k: v for k, v in start.weights.items() if k in keys}
    return replace(start, model=own, weights=weights, depth=depth, origin=f"{start.origin}, depth {depth}")
