"""Weights: from a run, from files, to another input size, to another segmentation, to fewer blocks."""

import hashlib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm.models
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer

from leanmim.checkpoint import is_ours
from leanmim.config import Pretrain
from leanmim.decoder import Decoder
from leanmim.encoders import Encoder, encoder_of
from leanmim.encoders.anytimm import AnyTimmEncoder
from leanmim.encoders.backbone import Backbone, Truncated, backbone_of, shallower
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.fake import fake_tensors
from leanmim.in_backward import trained_by
from leanmim.mim import MIM
from leanmim.published import published
from leanmim.run import Run, load
from leanmim.schedule import phases


def restore(run: str | Path) -> tuple[Pretrain, MIM, dict[str, Any]]:
    """The model of a run, from its newest checkpoint, or of a checkpoint file.

    Returns:
        Its configuration (that of the phase it has reached), the model, and the checkpoint (for ``step``, ``mean``,
        ``std``).
    """
    path = Path(run)
    state = load(path) if path.is_file() or path.suffix == ".pt" else Run(path).read()
    return *rebuild(state, str(run)), state


def rebuild(state: dict[str, Any], source: str) -> tuple[Pretrain, MIM]:
    """The model of a checkpoint, and the configuration of the phase it has reached.

    Raises:
        UserError: another version of leanmim wrote it, or its weights do not fit its configuration.
    """
    if "classes" in state:
        raise UserError(f"{source!r} is a fine-tuned run; this takes one of `leanmim pretrain`")
    try:
        config = Pretrain.from_json(state["config"])
    except UserError as error:
        raise UserError(f"{source!r}: {error}") from error
    config = replace(config, model=config.model.partition(".")[0])  # version 0.1.0 ignored a tag
    config = phases(config)[state.get("phase", 0)].config
    check_shapes(without_memory(config), state["model"], source)  # before a stranger's configuration takes any
    model = build(config)
    model.load_state_dict(state["model"])
    return config, model


def without_memory(config: Pretrain) -> MIM:
    """The model of a configuration, of fake tensors."""
    backbone = backbone_of(config, config.depth, device="meta")
    with fake_tensors():
        return build(config, backbone.to_empty(device="cpu"))


def check_shapes(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise UserError if weights have other names or shapes than a model's."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    if other := sorted(own.items() ^ theirs.items()):
        name = other[0][0]
        raise UserError(
            f"the checkpoint of {source!r} does not fit its own configuration: {name} has the shape "
            f"{theirs.get(name, 'of no weight')}, but {own.get(name, 'none')} belongs there"
        )


def adapt(backbone: Backbone, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with positions and window tables resized to the backbone's input size, by timm."""
    resize = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    return resize(state, backbone) if resize else state


def carry_over(old: Encoder, new: Encoder) -> None:
    """Give a backbone the weights of the same one at another input size, positions and window tables interpolated."""
    fit_backbone(new.backbone, old.backbone.state_dict(), "this run")


def carry_over_moments(old: MIM, before: list[Optimizer], new: MIM, after: list[Optimizer]) -> None:
    """Give the optimizers of the new model the state of the old ones, resized as the weights are."""
    start = "encoder.backbone."
    moments: dict[str, dict[str, torch.Tensor]] = {}
    state = {p: values for optimizer in before for p, values in optimizer.state.items()}
    states = {name: state.get(p, {}) for name, p in old.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq"):
        own = {n: s[key] if key in s else torch.zeros_like(p) for (n, p), s in
               zip(old.named_parameters(), states.values(), strict=True)}  # fmt: skip
        buffers = {k: v for k, v in old.encoder.backbone.state_dict().items() if start + k not in own}
        resized = adapt(
            new.encoder.backbone, buffers | {k[len(start) :]: v for k, v in own.items() if k.startswith(start)}
        )
        moments[key] = own | {start + k: v for k, v in resized.items()}
    names = {parameter: name for name, parameter in new.named_parameters()}
    for optimizer in after:
        for parameter in trained_by(optimizer):
            name = names[parameter]
            if states[name]:
                optimizer.state[parameter] = {
                    "step": states[name]["step"].clone(),
                    "exp_avg": moments["exp_avg"][name].clone(),
                    "exp_avg_sq": moments["exp_avg_sq"][name].clamp(min=0),  # interpolation may overshoot
                }


def fit_backbone(backbone: Backbone, state: dict[str, torch.Tensor], source: str, fresh: Collection[str] = ()) -> None:
    """Load weights, with timm resizing positions and window tables to the backbone's input size.

    Args:
        backbone: a timm model, with or without its head.
        state: by timm's names; those of a head that the model has not are left.
        source: for messages.
        fresh: names that the weights need not have.

    Raises:
        UserError: weights are missing, left over (a classifier's aside), or of another shape.
    """
    state = adapt(backbone, state)
    own = backbone.state_dict()
    names = backbone.pretrained_cfg.get("classifier") or ()
    heads = (names,) if isinstance(names, str) else names
    head = ("head.", "fc.", "fc_norm.", "head_dist.", *(f"{name}." for name in heads))
    missing = sorted(own.keys() - state.keys() - {*fresh})
    extra = sorted(key for key in state.keys() - own.keys() if not key.startswith(head))
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    for what, keys in (
        (f"it lacks {len(missing)} of its weights", missing),
        (f"it holds {len(extra)} weights that the model has not", extra),
        (f"{len(shapes)} of its weights have another shape", shapes),
    ):
        if keys:
            raise UserError(
                f"{source!r} does not fit the model: {what} ({', '.join(keys[:3])}); choose the --model, --model-kwargs "
                "and --depth that it was trained with"
            )
    backbone.load_state_dict({key: state.get(key, value) for key, value in own.items()})


Part = list[torch.Tensor | torch.nn.Module]


def surroundings(model: MIM) -> dict[str, Part]:
    """What surrounds the backbone. What belongs to a segment is called by the depth at which it ends, or (a token) begins:
    of a run with other segments its number is another.
    """
    encoder: Any = model.encoder
    inside = set(encoder.backbone.modules())
    parts: dict[str, Part] = {
        name: [token] for name in ("mask_token", "colour") if (token := getattr(encoder, name, None)) is not None
    }
    for i, (depth, decoder) in enumerate(zip(encoder.depths, cast(list[Decoder], model.decoders), strict=True)):
        if (norm := encoder.closing_norm(i)) not in inside:
            parts[f"norms.{depth}"] = [norm]
        if own := [part for part in encoder.parts(i) if isinstance(part, torch.nn.Parameter)] if i else []:
            parts[f"tokens.{encoder.depths[i - 1]}"] = list(own)
        tokens: Part = [] if decoder.mask_token is None else [decoder.mask_token]
        parts[f"decoders.{depth}"] = [decoder.embed, *tokens, decoder.layers, decoder.norm, decoder.head]
        if decoder.filling is not None:
            parts[f"decoders.{depth}.filling"] = [decoder.filling]
    return parts


def tensors(part: Part) -> list[torch.Tensor]:
    """Its weights, in order."""
    return [t for piece in part for t in (piece.parameters() if isinstance(piece, torch.nn.Module) else [piece])]


@torch.no_grad()
def take_over(model: MIM, other: MIM) -> set[str]:
    """Copy what surrounds the backbone from another model: each part as a whole or not at all.

    Returns:
        The parts that stay as they are, as `surroundings` calls them.
    """
    found, fresh = surroundings(other), set()
    for name, part in surroundings(model).items():
        mine, theirs = tensors(part), tensors(found.get(name, []))
        decoder = name.removesuffix(".filling")  # it goes with a decoder that was taken
        if decoder in fresh or [t.shape for t in mine] != [t.shape for t in theirs]:
            fresh.add(name)
            continue
        for own, value in zip(mine, theirs, strict=True):
            own.copy_(value)
    return fresh


def initialise(model: MIM, source: str, channels: int = 3) -> str:
    """Start from weights that were trained before.

    Of a leanmim run, decoder, closing norms and tokens are taken too, where a segment of both ends after the same block
    and they have the same shape.

    Args:
        model: to give the weights to.
        source: a run folder of pre-training or fine-tuning, an export folder, a checkpoint file of timm or leanmim, or timm's name of published weights.
        channels: of the model's images.

    Returns:
        What was taken, for people to read.

    Raises:
        UserError: the weights are missing, damaged, or of another model, or cannot be downloaded.
    """
    path = Path(source)
    if path.is_dir():
        path = next((p for p in (Run(path).best, Run(path).last, path / "model.safetensors") if p.is_file()), path)
    if path.is_dir():
        raise UserError(
            f"--init {source!r} is neither a run folder with a checkpoint (checkpoints/last.pt) nor an export folder "
            "(model.safetensors)"
        )
    if is_ours(path):
        state = load(path)
        if "classes" in state:  # a fine-tuned classifier; that of a ViT has its last norm after the pool
            tuned = state.get("average") or state["model"]
            norm = [key for key in model.encoder.backbone.state_dict() if key.startswith("norm.") and key not in tuned]
            fit_backbone(model.encoder.backbone, tuned, source, norm)
            return f"fine-tuned encoder from {source}"
        with torch.random.fork_rng(devices=[]):
            other = rebuild(state, source)[1]
        fit_backbone(model.encoder.backbone, other.encoder.backbone.state_dict(), source)
        fresh = take_over(model, other)
        if fresh >= {f"decoders.{depth}" for depth in model.encoder.depths}:
            return f"encoder (its decoder has another shape and is left) from {source}"
        return f"encoder and decoder from {source}" + (f"; new are {', '.join(sorted(fresh))}" if fresh else "")
    if not path.is_file():
        weights, source = published(source, channels)
    else:
        weights = read_weights(path, f"--init {source!r}")
    fit_backbone(model.encoder.backbone, weights, source)
    return f"encoder from {source}"


def read_weights(path: Path, source: str) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint file of timm's; those of the moving average where there are some.

    Raises:
        UserError: it is damaged or no checkpoint; the message begins with ``source``.
    """
    try:
        weights = timm.models.load_state_dict(os.fspath(path), use_ema=True)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                noted = (file.metadata() or {}).get("leanmim_digest")
            if noted not in (None, digest(weights)):
                raise ValueError("its checksum is wrong")
    except Exception as error:  # safetensors and torch raise many kinds for damaged files
        raise UserError(f"{source} is damaged or not a checkpoint ({type(error).__name__}: {error})") from error
    return weights


def digest(weights: Mapping[str, torch.Tensor], structure: str = "") -> str:
    """Of weights by name, and of what else decides on a model's features."""
    found = hashlib.blake2b(structure.encode(), digest_size=16)
    for name, value in sorted(weights.items()):  # a file has an order of its own
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_backbone(
    run: str | Path, input_size: tuple[int, int] | None = None, depth: int | None = None
) -> tuple[Backbone, Pretrain, dict[str, Any]]:
    """The pre-trained timm model of a run, at the size of pre-training or another.

    Args:
        run: its folder.
        input_size: height and width, px; None is that of pre-training.
        depth: only so many of its blocks or stages, the end of a segment; None is all.

    Returns:
        The backbone (in evaluation mode), the configuration, and the checkpoint.

    Raises:
        UserError: the run cannot be read, or no segment ends at ``depth``.
    """
    config, model, state = restore(run)
    encoder, sized = model.encoder, config
    if input_size is not None and input_size != config.size:
        sized = replace(config, input_size=input_size)
        encoder = encoder_of(sized)
        carry_over(model.encoder, encoder)
        for i in range(len(encoder.depths)):
            encoder.closing_norm(i).load_state_dict(model.encoder.closing_norm(i).state_dict())
    return truncated(encoder, sized, depth).eval(), config, state


def truncated(encoder: Encoder, config: Pretrain, depth: int | None) -> Backbone:
    """A backbone up to the end of a segment, closed by that segment's norm (BIM: several depths from one run).

    Args:
        encoder: trained.
        config: its configuration, with its input size.
        depth: blocks or stages; None is all.

    Raises:
        UserError: no segment ends there.
    """
    backbone = encoder.backbone
    if depth is None or depth == encoder.depths[-1]:
        norm = encoder.closing_norm(len(encoder.depths) - 1)
        own = isinstance(encoder, AnyTimmEncoder) and not isinstance(norm, torch.nn.Identity)
        return Truncated(backbone, norm) if own else backbone
    if depth not in encoder.depths:
        raise UserError(
            f"--depth {depth}: the segments of this run end at {', '.join(map(str, encoder.depths))}; choose one of these, "
            "or pre-train with other --segments"
        )
    norm, weights = encoder.closing_norm(encoder.depths.index(depth)), backbone.state_dict()
    arguments = shallower(backbone, depth)
    if not arguments:
        pruned = backbone_of(config, depth)
        pruned.load_state_dict({key: weights[key] for key in pruned.state_dict()})
        return Truncated(pruned, norm)
    shallow = backbone_of(config, **arguments)
    last = "fc_norm" if isinstance(getattr(shallow, "norm", None), torch.nn.Identity) else "norm"
    weights |= {f"{last}.{key}": value for key, value in norm.state_dict().items()}
    shallow.load_state_dict({key: weights[key] for key in shallow.state_dict()})
    return shallow
