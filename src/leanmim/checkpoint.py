"""The run folder and what it holds: checkpoints written atomically, read with ``weights_only=True``.

A checkpoint is ``{format, config, stage, step, mean, std, model, optimizers}``. There is no generator state to save:
every step seeds its own randomness from (seed, process, step).
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm.models
import torch
from torch.optim import AdamW

from leanmim.config import Pretrain
from leanmim.encoders import (
    Backbone,
    Encoder,
    Prefix,
    TimmEncoder,
    ViTEncoder,
    create_backbone,
    make_encoder,
    shorter,
)
from leanmim.errors import UserError
from leanmim.mim import MIM, build
from leanmim.schedule import stages

FORMAT = "leanmim-1"
# What may differ when a run is continued: none of it changes a weight.
FREE = {"out", "workers", "overwrite", "checkpoint_minutes", "memory", "effective_batch", "offload"}


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, flush it to disk, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of leanmim onto the CPU.

    Raises:
        UserError: it is missing, damaged, or not leanmim's.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {str(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(
            f"{str(path)!r} is damaged or not a checkpoint ({type(error).__name__}: {error}); "
            "put a good copy in its place, or train again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} is a checkpoint, but not one of leanmim ({FORMAT})")
    return state


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.folder / "config.json"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object a line: what `leanmim knn` and `leanmim probe` found."""
        return self.folder / "evaluations.jsonl"

    @property
    def cost(self) -> Path:
        """Predicted cost, and at the end what was measured."""
        return self.folder / "cost.json"

    @property
    def skipped(self) -> Path:
        """The unreadable files, one JSON object a line."""
        return self.folder / "skipped.jsonl"

    def read(self) -> dict[str, Any]:
        """The newest checkpoint.

        Raises:
            UserError: this is not a run folder, or its checkpoint is missing or damaged.
        """
        if not self.config.is_file():
            raise UserError(f"{str(self.folder)!r} is not a run folder of `leanmim pretrain`: it has no config.json")
        if not self.last.is_file():
            raise UserError(f"{str(self.folder)!r} has no checkpoint yet; let `leanmim pretrain` run on")
        return load(self.last)

    def batch(self) -> tuple[int, int] | None:
        """Batch size and accumulation of the run that the folder holds, if it holds one."""
        try:
            old = json.loads(self.config.read_text())
            return int(old["batch_size"]), int(old["accum"])
        except (OSError, ValueError, TypeError, KeyError):
            return None  # `to_resume` says what is wrong with the folder

    def to_resume(self, config: Pretrain) -> dict[str, Any] | None:
        """The checkpoint to continue from, or None to start afresh. Nothing is written.

        Raises:
            UserError: the folder holds another run, or something else, and may not be replaced.
        """
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return None
        if not self.folder.is_dir():
            raise UserError(f"--out {str(self.folder)!r} is a file; give a folder")
        try:
            old = json.loads(self.config.read_text())
            old["recipe"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"--out {str(self.folder)!r} is not empty and not a run of leanmim; choose another folder"
            ) from None
        if config.overwrite:
            return None
        new = json.loads(json.dumps(config.to_json()))
        old = json.loads(json.dumps(Pretrain(data="", out="").to_json() | old))  # older than a field: its default
        changed = [key for key in sorted(old.keys() | new.keys()) if key not in FREE and old.get(key) != new.get(key)]
        if changed:
            lines = [f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in changed]
            raise UserError(
                f"--out {str(self.folder)!r} holds a run of another configuration:\n" + "\n".join(lines)
                + "\nChoose another --out, give the same options to continue it, or --overwrite to start afresh"
            )  # fmt: skip
        try:
            return load(self.last) if self.last.exists() else None
        except UserError as error:
            raise UserError(f"cannot continue: {error}; or start afresh with --overwrite") from error

    def prepare(self, config: Pretrain, step: int) -> None:
        """Make the folder ready to continue after ``step`` steps; 0 starts afresh.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {str(self.folder)!r} cannot be made ({error}); choose another folder") from error
        if step == 0:  # of an earlier run only what leanmim wrote is removed
            for name in ("checkpoints", "tensorboard", "export"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("environment.json", "cost.json", "report.html"):
                (self.folder / name).unlink(missing_ok=True)
            pictures = (self.folder / "reconstructions.png", *self.folder.glob("reconstructions-block*.png"))
            for path in (*pictures, self.metrics, self.evaluations, self.skipped):
                path.unlink(missing_ok=True)
        write_json(self.config, config.to_json())
        if self.metrics.exists():  # lines written after the checkpoint will be written again
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomically(self.metrics, lambda file: file.write_text("".join(line + "\n" for line in kept)))


def restore(run: str | Path) -> tuple[Pretrain, MIM, dict[str, Any]]:
    """The model of a run, from its newest checkpoint.

    Returns:
        Its configuration (that of the stage it has reached), the model, and the checkpoint (for ``step``, ``mean``,
        ``std``).
    """
    state = Run(Path(run)).read()
    return *rebuild(state, str(run)), state


def rebuild(state: dict[str, Any], source: str) -> tuple[Pretrain, MIM]:
    """The model of a checkpoint, and the configuration of the stage it has reached.

    Raises:
        UserError: another version of leanmim wrote it, or its weights do not fit its configuration.
    """
    try:
        config = Pretrain.from_json(state["config"])
    except TypeError as error:
        raise UserError(f"{source!r} was written by another version of leanmim: {error}") from error
    config = stages(config)[state.get("stage", 0)].config
    model = build(config)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(f"the checkpoint of {source!r} does not fit its own configuration: {error}") from error
    return config, model


def adapt(backbone: Backbone, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with positions and window tables resized to the backbone's input size, by timm."""
    resize = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    return resize(state, backbone) if resize else state


def carry_over(old: Encoder, new: Encoder) -> None:
    """Give a backbone the weights of the same one at another input size.

    Sine-cosine positions are computed for the new grid, those of a checkpoint resized with the window tables.
    """
    computed = isinstance(old, ViTEncoder) and old.has_sincos()
    positions = new.backbone.pos_embed.detach().clone() if computed else None
    fit_backbone(new.backbone, old.backbone.state_dict(), "this run")
    if positions is not None:
        new.backbone.pos_embed.data.copy_(positions)


def carry_over_moments(old: MIM, before: list[AdamW], new: MIM, after: list[AdamW]) -> None:
    """Give the optimizers of the new model the state of the old ones, resized as the weights are."""
    start = "encoder.backbone."
    moments: dict[str, dict[str, torch.Tensor]] = {}
    states = {name: before[old.owner(name)].state.get(p, {}) for name, p in old.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq"):
        own = {n: s[key] if key in s else torch.zeros_like(p) for (n, p), s in
               zip(old.named_parameters(), states.values(), strict=True)}  # fmt: skip
        buffers = {k: v for k, v in old.encoder.backbone.state_dict().items() if start + k not in own}
        resized = adapt(
            new.encoder.backbone, buffers | {k[len(start) :]: v for k, v in own.items() if k.startswith(start)}
        )
        moments[key] = own | {start + k: v for k, v in resized.items()}
    for name, parameter in new.named_parameters():
        if states[name]:
            after[new.owner(name)].state[parameter] = {
                "step": states[name]["step"].clone(),
                "exp_avg": moments["exp_avg"][name].clone(),
                "exp_avg_sq": moments["exp_avg_sq"][name].clamp(min=0),  # interpolation may overshoot
            }


def fit_backbone(backbone: Backbone, state: dict[str, torch.Tensor], source: str) -> None:
    """Load encoder weights, with timm resizing positions and window tables to the backbone's input size.

    Raises:
        UserError: weights are missing, left over (a classifier's aside), or of another shape.
    """
    state = adapt(backbone, state)
    own = backbone.state_dict()
    head = ("head.", "fc.", "fc_norm.", "head_dist.")
    missing = sorted(own.keys() - state.keys())
    extra = sorted(key for key in state.keys() - own.keys() if not key.startswith(head))
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    for what, keys in (("lacks", missing), ("does not know", extra), ("has another shape for", shapes)):
        if keys:
            raise UserError(
                f"{source!r} does not fit the model: it {what} {len(keys)} of its weights ({', '.join(keys[:3])}); "
                "choose the --model, --model-kwargs and --depth that it was trained with"
                if what != "does not know"
                else f"{source!r} does not fit the model: it holds {len(keys)} weights that the model has not "
                f"({', '.join(keys[:3])}); choose the --model, --model-kwargs and --depth that it was trained with"
            )
    backbone.load_state_dict({key: state[key] for key in own})


def around(model: MIM) -> dict[str, torch.Tensor]:
    """All weights but the backbone's; those of a segment by the block after which it ends, not by its number."""
    depths = model.encoder.depths
    return {
        re.sub(r"(decoders|norms|tokens)\.(\d+)", lambda m: f"{m[1]}.{depths[int(m[2])]}", key, count=1): value
        for key, value in model.state_dict().items()
        if not key.startswith("encoder.backbone.")
    }


def take_over(model: MIM, other: MIM) -> set[str]:
    """Copy what surrounds the backbone from another model: a decoder as a whole or not at all, its filling aside.

    Returns:
        The parts that stay as they are, by the block after which their segment ends.
    """
    own, found = around(model), around(other)
    fresh = {key for key, value in own.items() if key not in found or found[key].shape != value.shape}
    for depth in model.encoder.depths:
        start = f"decoders.{depth}."
        body = {key for key in own.keys() | found.keys() if key.startswith(start) and ".filling." not in key}
        if body & fresh or body - own.keys():
            fresh |= {key for key in own if key.startswith(start)}
    for key in own.keys() - fresh:
        own[key].copy_(found[key])
    return {re.sub(r"^(encoder\.)?(borders\.)?(\w+(\.\d+)?(\.filling)?).*", r"\3", key) for key in fresh}


def initialise(model: MIM, source: str) -> str:
    """Start from the weights of a timm checkpoint file, a leanmim checkpoint file, or a run folder.

    Decoder, closing norm and tokens are taken too, where a segment of both ends after the same block and they have the
    same shape.

    Returns:
        What was taken, for people to read.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    path = Path(source)
    path = Run(path).last if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"--init {source!r}: there is no such file or run folder")
    if path.suffix == ".pt" and (state := load(path)):
        with torch.random.fork_rng(devices=[]):
            other = rebuild(state, source)[1]
        fit_backbone(model.encoder.backbone, other.encoder.backbone.state_dict(), source)
        fresh = take_over(model, other)
        if fresh >= {f"decoders.{depth}" for depth in model.encoder.depths}:
            return f"encoder (its decoder has another shape and is left) from {source}"
        return f"encoder and decoder from {source}" + (f"; new are {', '.join(sorted(fresh))}" if fresh else "")
    try:
        weights = timm.models.load_state_dict(os.fspath(path), use_ema=True)
    except Exception as error:  # safetensors and torch raise many kinds for damaged files
        raise UserError(
            f"--init {source!r} is damaged or not a checkpoint ({type(error).__name__}: {error})"
        ) from error
    fit_backbone(model.encoder.backbone, weights, source)
    return f"encoder from {source}"


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
    if input_size is not None and input_size != config.size:
        backbone = create_backbone(config.model, input_size, config.channels, config.depth, **config.model_kwargs)
        other = make_encoder(backbone, config.masking, input_size, config.channels, config.segments, config.depth)
        carry_over(model.encoder, other)
        ends = range(len(other.depths))
        for mine, theirs in zip(map(other.closing_norm, ends), map(model.encoder.closing_norm, ends), strict=True):
            mine.load_state_dict(theirs.state_dict())
        return prefix(other, replace(config, input_size=input_size), depth).eval(), config, state
    return prefix(model.encoder, config, depth).eval(), config, state


def prefix(encoder: Encoder, config: Pretrain, depth: int | None) -> Backbone:
    """A backbone up to the end of a segment, closed by that segment's norm (BIM: several depths from one run).

    Raises:
        UserError: no segment ends there.
    """
    if depth is None or depth == encoder.depths[-1]:
        norm = encoder.closing_norm(len(encoder.depths) - 1)
        outside = isinstance(encoder, TimmEncoder) and not isinstance(norm, torch.nn.Identity)
        return Prefix(encoder.backbone, norm) if outside else encoder.backbone
    if depth not in encoder.depths:
        raise UserError(
            f"--depth {depth}: the segments of this run end at {', '.join(map(str, encoder.depths))}; choose one of these, "
            "or pre-train with other --segments"
        )
    norm = encoder.closing_norm(encoder.depths.index(depth))
    arguments = shorter(encoder.backbone, depth)
    if not arguments:
        cut = create_backbone(config.model, config.size, config.channels, depth, **config.model_kwargs)
        whole = encoder.backbone.state_dict()
        cut.load_state_dict({key: whole[key] for key in cut.state_dict()})
        return Prefix(cut, norm)
    short = create_backbone(config.model, config.size, config.channels, **{**config.model_kwargs, **arguments})
    own, whole = short.state_dict(), encoder.backbone.state_dict()
    last = "fc_norm." if isinstance(getattr(short, "norm", None), torch.nn.Identity) else "norm."
    closing = {last + key: value for key, value in norm.state_dict().items()}
    short.load_state_dict({key: closing.get(key, whole.get(key)) for key in own})
    return short
