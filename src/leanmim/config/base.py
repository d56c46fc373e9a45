"""What the configurations of all commands share: fields declared once, allowed values declared once, checks, JSON."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
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
Decode = Literal["fast", "exact"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Pool = Literal["avg", "token", "timm"]
Values = Literal["auto", "8-bit", "stored"]
Auto = Literal["auto"]  # chosen from the data, the model and the time there is: see auto.py
Segments = int | tuple[int, ...]  # so many equal ones, or the block or stage after which each ends

FREE_IN_TRAINING = frozenset({
    "data", "out", "workers", "overwrite", "checkpoint_minutes", "log_every", "memory", "effective_batch", "hours",
    "keep", "max_bad_share", "max_bad_steps", "data_changed", "data_patience", "process_timeout", "threads", "channels_last",
    "compile", "deterministic", "track",
})  # fmt: skip
"""Fields of a training that may differ when it is continued: none of them changes a weight, but by rounding the last ones before
track."""

AGAINST_DIVERGENCE = frozenset({"blr", "lr", "clip_grad", "precision"})
"""Fields of a training that may differ when it is continued before its end; the change is written down."""

MANY = 10**6
RANGES: dict[str, tuple[float, float]] = {
    # the model
    "input_size": (1, 16384), "depth": (1, 1000), "segments": (1, 1000), "decoder_depth": (0, 1000),
    "decoder_width": (4, 65536), "decoder_heads": (1, 65536), "drop_path": (0, 1), "head_init": (0, MANY),
    # masks and targets
    "mask_ratio": (0, 1), "mask_unit": (0, 16384), "hog_cell": (1, 16384), "throw": (0, 1), "fill": (0, 1000),
    # images
    "channels": (1, 16),
    "crop_scale": (0, 1), "crop_ratio": (0, 100), "crop": (0.01, 1), "flip": (0, 1),
    "mixup": (0, MANY), "cutmix": (0, MANY), "mixup_switch": (0, 1), "smoothing": (0, 1), "erase": (0, 1),
    "size": (1, 16384), "quality": (1, 100), "eval_size": (1, 16384),
    # labels
    "label_share": (0, 1), "labels_per_class": (1, MANY), "val_share": (0.01, 0.9), "shots": (1, MANY), "draws": (1, MANY), "screen_share": (0.01, 1),
    # steps
    "epochs": (1e-6, MANY), "hours": (1e-6, MANY), "batch_size": (1, MANY), "accum": (1, MANY), "effective_batch": (1, MANY),
    "blr": (0, MANY), "lr": (0, MANY), "min_lr": (0, MANY), "warmup_share": (0, 1), "warmup_epochs": (0, MANY),
    "weight_decay": (0, MANY), "betas": (0, 1), "clip_grad": (0, MANY), "layer_decay": (0.01, 1), "ema": (0, 1),
    "phase_scales": (0, 100), "phase_starts": (0, 1), "phase_batches": (1, MANY), "phase_accums": (1, MANY),
    "phase_blrs": (0, MANY), "finetune_epochs": (1, MANY),
    # measures
    "k": (1, MANY), "temperature": (1e-4, MANY), "c": (1e-9, 10**9), "probe_batch_size": (2, MANY), "queries": (1, MANY),
    "void": (0, 65535), "patches": (1, MANY),
    "layer": (1, 1000), "layers": (0, 1000), "top": (1, MANY), "count": (1, MANY), "among": (2, MANY), "segment": (0, 1000), "tiles": (0, 32),
    "knn_every": (1, MANY), "show_every": (0, MANY), "eval_every": (1, MANY), "images_per_second": (1e-6, 10**9),
    # the machine, faults, the log
    "seed": (0, 2**32 - 1), "seeds": (1, 1000), "jobs": (1, 1024), "workers": (-1, 1024), "threads": (1, 1024), "log_every": (1, MANY), "checkpoint_minutes": (0, MANY), "keep": (1, 100),
    "max_bad_share": (0, 1), "max_bad_steps": (0, MANY), "data_patience": (0, MANY), "process_timeout": (1e-3, MANY),
}  # fmt: skip
"""The least and the largest value of every field that is a number, or holds some; the same for all commands."""

ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # with which timm reads descriptions from the network or from files
NOT_ARGUMENTS = dict.fromkeys(
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"),
    "weights are given by --init of `leanmim pretrain`, or by START",
) | {
    "in_chans": "give --channels",
    "img_size": "give --input-size",
    "patch_drop_rate": "what is left out is masked; give --mask-ratio",
    "num_classes": "the classes are those of the labelled folder",
} | dict.fromkeys(
    ("features_only", "out_indices", "output_stride", "scriptable", "exportable", "no_jit", "device", "dtype"),
    "leanmim builds the whole model itself; leave it out",
)  # fmt: skip
"""Arguments of timm.create_model that may not be given, and why: they would load other files, or are set by leanmim."""
ABOVE_0 = ("patch_size", "num_heads", "embed_dim", "mlp_ratio")  # those whose zero timm would find out late

Self = TypeVar("Self", bound="Config")
Own = TypeVar("Own", bound="Images")


class Stored(int):
    """So many channels whose values are taken as they are stored, in float32, and not converted to 8 bits."""


def as_read(channels: int, values: str) -> int:
    """The channels as sources of images take them; `Stored` if their values are not converted."""
    return Stored(channels) if values == "stored" or (values == "auto" and channels not in (1, 3)) else channels


def check_values(channels: int | None, values: str) -> None:
    """Raise UserError for channels that no 8-bit picture has."""
    if values == "8-bit" and channels not in (None, 1, 3):
        raise UserError(f"--values 8-bit is for 1 or 3 channels, not {channels}; give --values stored")


def uncut(segments: Segments) -> bool:
    """Whether this is one segment: the backbone as a whole."""
    return segments in (1, (1,))


def check_pair(name: str, pair: tuple[float, float] | str) -> None:
    """Raise UserError for a pair that does not rise from above 0; auto is no pair."""
    if isinstance(pair, str):
        return
    low, high = pair
    if not 0 < low <= high:
        raise UserError(f"{flag(name)} {low} {high} must be 0 < low <= high <= {RANGES[name][1]:g}")


def check_size(size: tuple[int, ...]) -> None:
    """Raise UserError for an input size of no number, or of more than two."""
    if not 0 < len(size) <= 2:
        raise UserError(f"--input-size takes one number or two (height width), not {len(size)}")


def check_model(model: str | None, model_kwargs: Mapping[str, Any]) -> None:
    """Raise UserError for a model whose name or arguments make timm read other files or the network, or cannot be.

    Args:
        model: timm's name of an architecture; None is that of the weights.
        model_kwargs: further arguments for timm.create_model.
    """
    if model is not None and model.startswith(ELSEWHERE):
        raise UserError(
            f"--model {model!r} names weights; give timm's name of the architecture, and to `leanmim pretrain` --init {model}"
        )
    for key, value in model_kwargs.items():
        if key in NOT_ARGUMENTS:
            raise UserError(f"--model-kwargs {key} is not for the model: {NOT_ARGUMENTS[key]}")
        for item in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(item, Number | None):
                raise UserError(f"--model-kwargs {key} cannot be {value!r}; it takes a number, a word, True or False")
            if isinstance(item, int | float) and not abs(item) <= 65536:
                raise UserError(f"--model-kwargs {key} {value} is out of range; it is at most 65536")
        if key in ABOVE_0 and isinstance(value, int | float) and value <= 0:
            raise UserError(f"--model-kwargs {key} {value} is out of range; it is above 0")
        if key == "depth" and not (isinstance(value, int) and 1 <= value <= 1000):
            raise UserError(f"--model-kwargs depth {value} is out of range; it is at least 1, at most 1000")
        if key.endswith("_rate") and not (isinstance(value, int | float) and 0 <= value < 1):
            raise UserError(f"--model-kwargs {key} {value} is out of range; it is at least 0 and below 1")


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
    ADJUSTABLE: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ when an unfinished run is continued, against a training that diverges: from then on."""
    LEFT_EMPTY: ClassVar[frozenset[str]] = frozenset()
    """Texts that recipes leave empty."""
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
            except (TypeError, OverflowError):  # a whole number can be too large for a float
                raise UserError(f"{own.name} cannot be {value!r}; it takes {described(own.type)}") from None

    def check(self) -> None:
        """Raise UserError for a number that is out of its range, as NaN always is, and for an empty text."""
        for name in (own.name for own in fields(self)):
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, str) and (not item or "\0" in item) and not (name in self.LEFT_EMPTY and not value):
                    raise UserError(f"{flag(name)} {item!r} names nothing; give something, or leave it out")
                if type(item) in (int, float) and name in RANGES and not RANGES[name][0] <= item <= RANGES[name][1]:
                    low, high = RANGES[name]
                    raise UserError(f"{flag(name)} {item} is out of range; it is at least {low}, at most {high}")

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
        """The fields that differ from a stored configuration and may not, for people to read."""
        differing = self.differences(stored).items()
        return [
            f"{key}: {before!r} there, {now!r} now" for key, (before, now) in differing if key not in self.ADJUSTABLE
        ]

    def adjusted(self, stored: dict[str, Any]) -> list[dict[str, Any]]:
        """The fields that differ from a stored configuration and may in an unfinished run: option, before, now."""
        differing = self.differences(stored).items()
        return [
            {"option": flag(key), "before": before, "now": now}
            for key, (before, now) in differing
            if key in self.ADJUSTABLE
        ]

    def differences(self, stored: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The fields that differ from a stored configuration and are not free: what is there, and what is here.

        A field that the stored one lacks, because it is older, had its default.
        """
        own = json.loads(json.dumps(self.to_json()))
        # no default: `data` and `out`, which were always stored, and tables, which begin empty
        default = {f.name: {} if f.default is MISSING else f.default for f in fields(self)}
        there = json.loads(json.dumps(default)) | {self.RENAMED.get(key, key): value for key, value in stored.items()}
        return {
            key: (there.get(key), own.get(key))
            for key in sorted(own.keys() | stored.keys() - self.RENAMED.keys())
            if key not in self.FREE
            and there.get(key) != own.get(key)
            and not (key in self.GROWING and isinstance(there[key], int) and own[key] > there[key])
        }


@dataclass(frozen=True, kw_only=True)
class Machine(Config):
    """Where a command runs."""

    device: Device = "auto"
    """Where to run; auto takes the GPU if there is one."""
    workers: int = -1
    """Processes that read images, for each process that computes. -1 is as many as keep up with a training's measured step,
    for other commands the CPU's cores less one, of more than 16 half of them."""


@dataclass(frozen=True, kw_only=True)
class Computing(Machine):
    """How a training computes: auto is measured before the first step, and kept when the run is continued."""

    threads: int | Auto = "auto"
    """Threads of the CPU to compute with, for each process. auto measures; where OMP_NUM_THREADS is set it is that."""
    precision: Precision = "auto"
    """Of the forward pass; targets and losses are fp32. auto is bf16 on GPUs that have it, and on CPUs that have it and are
    measured to be faster with it, fp32 elsewhere. Matrix products in fp32 go by TF32 on GPUs that have it."""
    channels_last: bool | Auto = "auto"
    """Channels side by side in memory, for convolutions; auto measures."""
    compile: bool | Auto = "auto"
    """Whether to torch.compile, for a later start and perhaps faster steps. auto measures on a GPU, for runs of 20 minutes or
    more; on CPUs it is no."""
    deterministic: bool = False
    """On a GPU only algorithms whose results do not depend on the order in which its threads end, which are slower: made for runs
    that are repeated and continued bit for bit, as they are on a CPU without it, but not yet tried on a GPU. What auto would
    measure is then not measured, but for the workers."""


@dataclass(frozen=True, kw_only=True)
class Valued(Config):
    """What the values of images are."""

    values: Values = "auto"
    """8-bit: images of any kind are converted to RGB or grey of 8 bits. stored: values stay as the file has them, 8 or 16 bits or
    floating point, and the file has so many channels. auto is 8-bit for 1 and 3 channels, stored for others."""


@dataclass(frozen=True, kw_only=True)
class Images(Valued):
    """The images of a start that knows none, and how they are normalised."""

    channels: int | None = None
    """Image channels, 1 to 16; None is the start's own."""
    mean: tuple[float, ...] | None = None
    """Given mean, one number per channel: on the scale 0 to 1, of stored values in their own units."""
    std: tuple[float, ...] | None = None
    """Given standard deviation, one number per channel, likewise."""
    stats: str | None = None
    """File of `leanmim stats --out`, which gives --channels, --values, --mean and --std."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_values(self.channels, self.values)
        if (self.mean is None) != (self.std is None):
            raise UserError("give --mean and --std together, or neither")
        if self.mean is None or self.std is None:
            return
        if self.stats is not None:
            raise UserError("--stats gives --mean and --std too; leave one out")
        count = self.channels or len(self.mean)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) != count:
                raise UserError(f"--{name} has {len(value)} numbers for {count} channels; give one for each")
        stored = isinstance(as_read(count, self.values), Stored)
        low, high = (-1e30, 1e30) if stored else (0, 1)
        if not all(low <= value <= high for value in self.mean) or not all(0 < value <= high for value in self.std):
            numbers = f"--mean {' '.join(map(str, self.mean))} and --std {' '.join(map(str, self.std))}"
            remedy = "" if stored else "; divide numbers of the scale 0 to 255 by 255, or give --values stored"
            raise UserError(f"{numbers} must lie between {low:g} and {high:g}, --std above 0{remedy}")

    def with_stats(self: Own) -> Own:
        """With the numbers of --stats in place of the file's name, checked.

        Raises:
            UserError: a value is impossible, or the file is none of `leanmim stats`.
        """
        self.check()
        if self.stats is None:
            return self
        try:
            found = json.loads(Path(self.stats).read_text(encoding="utf-8"))
            known = {name: found[name] for name in ("channels", "values", "mean", "std")}
            changed = replace(self, stats=None, **known)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--stats {self.stats!r} is no file of `leanmim stats --out` ({type(error).__name__}: {error})"
            ) from error
        changed.check()
        return changed


@dataclass(frozen=True, kw_only=True)
class Model(Valued):
    """Which backbone, and the images it takes."""

    model: str = "vit_small_patch16_224"
    """timm model name, without a tag; weights are given by --init."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs: --model-kwargs patch_size 4 depth 8."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number for a square, or height and width. Empty is the recipe's own."""
    channels: int = 3
    """Image channels, 1 to 16; for 1 and 3 files of any kind are converted, others come from TIFF files and .npy arrays."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_values(self.channels, self.values)
        check_size(self.input_size or (1,))
        check_model(self.model, self.model_kwargs)

    @property
    def read_as(self) -> int:
        """The channels as sources of images take them."""
        return as_read(self.channels, self.values)

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
    step. There is always one after the first step, one at the end, and one where a signal (Ctrl-C, SIGTERM, SIGHUP,
    SIGUSR1) asks for it: then the exit code is 128 + its number, and the same command continues."""
    keep: int = 2
    """Checkpoints that are kept: the newest, and those before it, for the case that it is damaged."""
    overwrite: bool = False
    """Start afresh in a run folder that already holds another run. A job that torchrun or Slurm starts again continues what
    it has begun itself."""
    track: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Trackers that get each line of metrics.jsonl, beside TensorBoard, and of `pretrain` the pictures over training time, which show
    four of your images (--show-every 0 sends none): wandb (Weights & Biases), mlflow. They are told where to log by their own
    variables, as WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI. A continued run goes on in the tracker's own."""

    def check(self) -> None:
        """Raise UserError for an impossible value, and a tracker that is not installed."""
        super().check()
        for name in self.track:
            if find_spec(name) is None:
                raise UserError(f"--track {name} needs the package {name}: pip install {name}")


@dataclass(frozen=True, kw_only=True)
class Faults(Config):
    """What a training does when something goes wrong."""

    max_bad_share: float = 0.1
    """Unreadable files are skipped and listed; a larger share of the images than this ends the run."""
    max_bad_steps: int = 10
    """A step with a loss or gradient that is not finite is skipped and listed; more than so many in a row end the run."""
    data_changed: Literal["refuse", "accept"] = "refuse"
    """When a run is continued with other image files than it began with: refuse, or go on with those there are now."""
    data_patience: float = 5.0
    """Minutes to wait for images that are away, as those on a network drive can be."""
    process_timeout: float = 10.0
    """Minutes after which a process that does not answer ends the others."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(Config):
    """Batches, steps and learning rate."""

    epochs: int | float | Auto = "auto"
    """Passes over the data, the last of which may be a part: 1.5. auto takes as many as fit into --hours. A run can be continued with more of them."""
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
    """Base learning rate: lr = blr x effective batch / 256. auto follows from the batch."""
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

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        parse_bytes(self.memory)
        if max(self.betas) == 1:
            raise UserError(f"--betas {self.betas[0]} {self.betas[1]} must be at least 0 and below 1")
        if self.lr is not None and self.blr != "auto":
            raise UserError("--lr and --blr are two ways to give the learning rate; leave one out")
        if self.batch_size == "auto" and self.accum != 1:
            raise UserError(
                "--batch-size auto chooses --accum itself; leave --accum out and set --effective-batch, or give --batch-size"
            )
        if "auto" not in (self.epochs, self.warmup_share) and not 0 <= self.warmup <= float(self.epochs):
            raise UserError(f"--warmup-epochs {self.warmup_epochs} is not between 0 and the {self.epochs} epochs")

    @property
    def warmup(self) -> float:
        """Resolved warm-up, epochs; these are a number."""
        return self.warmup_share * float(self.epochs) if self.warmup_epochs is None else self.warmup_epochs
