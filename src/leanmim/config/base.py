"""What the configurations of all commands share: fields declared once, allowed values declared once, checks, JSON."""

import difflib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from leanmim.config.values import described, fitted
from leanmim.errors import UserError
from leanmim.version import __version__

Number = int | float | bool | str
Masking = Literal["drop", "token", "pixel"]
Target = Literal["pixels", "raw-pixels", "hog"]
Loss = Literal["l1", "l2"]
Select = Literal["furthest", "random"]
Start = Literal["visible", "random"]
LinearInit = Literal["timm", "xavier"]
Schedule = Literal["cosine", "step", "constant"]
Interpolation = Literal["bicubic", "bilinear"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Pool = Literal["avg", "token", "timm"]
Auto = Literal["auto"]  # chosen from the data, the model and the time there is: see auto.py
Segments = int | tuple[int, ...]  # so many equal ones, or the block or stage after which each ends

FREE_IN_TRAINING = frozenset({
    "data", "out", "workers", "overwrite", "checkpoint_minutes", "log_every", "memory", "effective_batch", "hours",
    "max_bad_share",
})  # fmt: skip
"""Fields of a training that may differ when it is continued: none of them changes a weight."""

Self = TypeVar("Self", bound="Config")


def uncut(segments: Segments) -> bool:
    """Whether this is one segment: the backbone as a whole."""
    return segments in (1, (1,))


def check_ranges(config: Any, *ranges: tuple[str, int | float, int | float | None]) -> None:
    """Raise UserError for a number that is not from low to high; NaN never is. None and auto are no numbers."""
    for name, low, high in ranges:
        value = getattr(config, name)
        if value is None or value == "auto":
            continue
        if not low <= value <= (math.inf if high is None else high):
            bounds = f"at least {low}, at most {high}" if high else f"at least {low}"
            raise UserError(f"{flag(name)} {value} is out of range; it is {bounds}")


def check_pair(name: str, pair: tuple[float, float] | str, most: float) -> None:
    """Raise UserError for a pair that does not rise from above 0 to at most ``most``; auto is no pair."""
    if isinstance(pair, str):
        return
    low, high = pair
    if not 0 < low <= high <= most:
        limits = "0 < low <= high" + (f" <= {most:g}" if math.isfinite(most) else "")
        raise UserError(f"{flag(name)} {low} {high} must be {limits}")


def check_size(size: tuple[int, ...]) -> None:
    """Raise UserError for an impossible input size."""
    if not 0 < len(size) <= 2:
        raise UserError(f"--input-size takes one number or two (height width), not {len(size)}")
    if min(size) < 1:
        raise UserError(f"--input-size {' '.join(map(str, size))} must be positive")


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def parse_bytes(text: str) -> int | None:
    """Bytes of "8GiB", "500 MB" or a plain number; None of "auto"; more than any machine has of "none".

    Raises:
        UserError: it is none of these.
    """
    if text in ("auto", "none"):
        return None if text == "auto" else 2**62
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--memory {text!r} is not a size; give one as 8GiB, 500MB, auto or none")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a command. It can be stored as JSON and compared with a stored one."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ when a run is continued: none of them changes a weight."""
    GROWING: ClassVar[frozenset[str]] = frozenset()
    """Fields that may be larger when a run is continued."""
    RENAMED: ClassVar[dict[str, str]] = {}
    """Fields of earlier versions, and what they are called now."""

    def __post_init__(self) -> None:
        """Fit the values to the types of their fields: 96 or [96] to (96,), a path to a string.

        Raises:
            UserError: a value is of another type.
        """
        for own in fields(self):
            value = getattr(self, own.name)
            try:
                object.__setattr__(self, own.name, fitted(value, own.type))
            except TypeError:
                raise UserError(f"{own.name} cannot be {value!r}; it takes {described(own.type)}") from None

    @classmethod
    def of(cls: type[Self], config: Self | None = None, /, **changes: Any) -> Self:
        """A configuration of fields by name; or a given one, with those changed.

        Raises:
            UserError: there is no such field, a needed one is missing, or a value is of another type.
        """
        if config is not None and not isinstance(config, cls):
            raise UserError(f"give a leanmim.{cls.__name__}, or its fields by name; {type(config).__name__} is neither")
        for name in changes.keys() - {own.name for own in fields(cls)}:
            near = difflib.get_close_matches(name, [own.name for own in fields(cls)], n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"leanmim.{cls.__name__} has no field {name!r}; {meant}help(leanmim.{cls.__name__}) has all"
            )
        if config is not None:
            return replace(config, **changes)
        needed = [own.name for own in fields(cls) if own.default is MISSING and own.default_factory is MISSING]
        if missing := [name for name in needed if name not in changes]:
            raise UserError(f"leanmim.{cls.__name__} needs {' and '.join(missing)}")
        return cls(**changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values only, for config.json and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls: type[Self], values: dict[str, Any]) -> Self:
        """The inverse of `to_json`, also for what an earlier version wrote.

        Raises:
            UserError: there is a field that this version does not know.
        """
        renamed = {cls.RENAMED.get(k, k): v for k, v in values.items()}
        if unknown := renamed.keys() - {own.name for own in fields(cls)}:
            raise UserError(
                f"the configuration has fields that leanmim {__version__} does not know ({', '.join(sorted(unknown))}); "
                "another version wrote it"
            )
        return cls(**renamed)

    def changes(self, stored: dict[str, Any]) -> list[str]:
        """The fields that differ from a stored configuration and may not, for people to read.

        A field that the stored one lacks, because it is older, had its default.
        """
        own = json.loads(json.dumps(self.to_json()))
        # no default: `data` and `out`, which were always stored, and tables, which begin empty
        default = {f.name: {} if f.default is MISSING else f.default for f in fields(self)}
        there = json.loads(json.dumps(default)) | {self.RENAMED.get(key, key): value for key, value in stored.items()}
        return [
            f"{key}: {there.get(key)!r} there, {own.get(key)!r} now"
            for key in sorted(own.keys() | stored.keys() - self.RENAMED.keys())
            if key not in self.FREE
            and there.get(key) != own.get(key)
            and not (key in self.GROWING and own[key] > there[key])
        ]


@dataclass(frozen=True, kw_only=True)
class Machine(Config):
    """Where a command runs."""

    device: Device = "auto"
    """Where to run; auto takes the GPU if there is one."""
    workers: int = -1
    """Processes that read images, for each process that computes; -1 is the CPU count less one, 8 at most."""


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """Which backbone, and the images it takes."""

    model: str = "vit_small_patch16_224"
    """timm model name, without a tag; weights are given by --init."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs: --model-kwargs patch_size 4 depth 8."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number for a square, or height and width. Empty is the recipe's own."""
    channels: Literal[1, 3] = 3
    """Image channels; files of any kind are converted."""

    @property
    def size(self) -> tuple[int, int]:
        """Input height and width, px."""
        return (self.input_size[0], self.input_size[-1])


@dataclass(frozen=True, kw_only=True)
class Logging(Config):
    """What a resumable loop writes, and when."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints, each with a line of metrics.jsonl: the most that a killed run loses. 0 is one each
    step. There is always one at the end."""
    overwrite: bool = False
    """Start afresh in a run folder that already holds another run."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(Config):
    """Batches, steps and learning rate."""

    epochs: int | Auto = "auto"
    """Passes over the data. auto takes as many as fit into --hours. A run can be continued with more of them."""
    hours: float | None = None
    """With --epochs auto: the time there is; none given is one hour."""
    batch_size: int | Auto = "auto"
    """Images per process and forward pass. The effective batch is batch_size x accum x processes. auto takes the
    largest that fits --memory by prediction, and accumulates up to --effective-batch."""
    accum: int = 1
    """Forward passes whose gradients are averaged into one step."""
    effective_batch: int | Auto = "auto"
    """With --batch-size auto: images per step, over all processes. auto is fewer where there would be too few steps."""
    memory: str = "auto"
    """Memory to stay within, for example 8GiB; auto is what the device has free. A run that is predicted to need more does
    not start; none lets it."""
    blr: float | Auto = "auto"
    """Base learning rate: lr = blr x effective batch / 256. auto follows from batch and model."""
    lr: float | None = None
    """Learning rate after the warm-up, whatever the batch; in place of --blr."""
    schedule: Schedule = "cosine"
    """Of the learning rate after the warm-up. cosine: half a cosine to 0. step: constant, and a tenth of it in the last
    eighth (SimMIM). constant: constant, then linear to 0 in the last fifth; such a run is continued best with more
    epochs."""
    warmup_share: float = 0.05
    """Linear warm-up, as a share of the epochs (MAE: 40 of 800)."""
    warmup_epochs: float | None = None
    """Linear warm-up in epochs; overrides --warmup-share."""
    weight_decay: float = 0.05
    """AdamW's weight decay; never on biases, norms, tokens, nor on what the backbone itself exempts."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    clip_grad: float = 0.0
    """Largest norm of the gradient, of each segment its own; 0 is no clipping."""

    @property
    def warmup(self) -> float:
        """Resolved warm-up, epochs; these are a number."""
        return self.warmup_share * int(self.epochs) if self.warmup_epochs is None else self.warmup_epochs
