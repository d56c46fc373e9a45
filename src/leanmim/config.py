"""One frozen dataclass per command. A field's docstring is its help on the command line."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tyro.conf import Positional

from leanmim.errors import UserError

Number = int | float | bool | str


def check_ranges(config: Any, *ranges: tuple[str, int | float, int | None]) -> None:
    """Raise UserError for a number that is not from low to high; NaN never is."""
    for name, low, high in ranges:
        value = getattr(config, name)
        if not low <= value <= (math.inf if high is None else high):
            bounds = f"at least {low}" + f", at most {high}" * bool(high)
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; it is {bounds}")


def check_size(size: tuple[int, ...]) -> None:
    """Raise UserError for an input size that cannot be."""
    if not 0 < len(size) <= 2:
        raise UserError(f"--input-size takes one number or two (height width), not {len(size)}")
    if min(size) < 1:
        raise UserError(f"--input-size {' '.join(map(str, size))} must be positive")


def parse_bytes(text: str) -> int | None:
    """Bytes of "8GiB", "500 MB" or a plain number; None of "auto".

    Raises:
        UserError: it is none of these.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--memory {text!r} is not a size; give one as 8GiB, 500MB, or auto")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


@dataclass(frozen=True)
class Pretrain:
    """Everything that defines a pre-training run. The recipes are values of this class."""

    data: str
    """Folder of images, flat or nested; labels are not needed and ignored."""
    out: str
    """Run folder. The same command again continues the run in it."""
    recipe: str = "mae"
    """Name of the recipe, for the records."""

    model: str = "vit_small_patch16_224"
    """timm model name."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs: --model-kwargs patch_size 4 depth 8."""
    init: str | None = None
    """Start from these weights: a timm or leanmim checkpoint file, or a leanmim run folder."""
    input_size: tuple[int, ...] = (224,)
    """Pixels: one number for a square, or height and width."""
    channels: Literal[1, 3] = 3
    """Image channels; files of any kind are converted."""
    stage_scales: tuple[float, ...] = ()
    """Progressive resolution (FastMIM-P): the size of each stage as a multiple of --input-size. Empty is one stage."""
    stage_starts: tuple[float, ...] = ()
    """Where each stage begins, as a share of the epochs: 0 first, then rising."""
    stage_batches: tuple[int, ...] = ()
    """Batch size of each stage; empty is --batch-size for all."""
    stage_accums: tuple[int, ...] = ()
    """Accumulation of each stage; empty is --accum for all."""
    stage_blrs: tuple[float, ...] = ()
    """Base learning rate of each stage; empty is --blr for all. lr = blr x the stage's effective batch / 256."""

    depth: int | None = None
    """Pre-train only the first layers: blocks of a ViT, stages of a hierarchical model. None is all."""
    linear_init: Literal["timm", "xavier"] = "timm"
    """Initial weights of the linear layers of a hierarchical model: timm's own, or Xavier-uniform with zero biases
    (FastMIM). A plain ViT has the latter always (MAE)."""
    masking: Literal["drop", "token", "pixel"] = "drop"
    """How the mask reaches the backbone: drop masked tokens (MAE, plain ViT), put a learned token there (SimMIM, ViT
    and Swin), or paint a learned colour on the image (FastMIM, any timm backbone)."""
    mask_ratio: float | tuple[float, ...] = 0.75
    """Share of the image that is masked, in (0, 1). With --segments also one for each, not falling (BIM: later segments
    see fewer patches); or two, the first's and the last's, with equal steps between."""
    mask_unit: int = 0
    """Side of the squares that are masked, px; 0 is one patch. With pixel masking it may be less than a patch."""
    target: Literal["pixels", "raw-pixels", "hog"] = "pixels"
    """What is predicted: pixels normalised patch by patch, raw pixels of the normalised image, or histograms of
    oriented gradients (FastMIM)."""
    hog_cell: int = 8
    """Side of HOG's cells, px; it divides the patch."""
    loss: Literal["l1", "l2"] = "l2"
    """Compared by absolute or by squared difference, on masked patches only."""
    decoder_depth: int | Literal["auto"] = 8
    """Transformer layers of the decoder; 0 is one linear layer (not with drop). auto is 1 for a ViT and 4 for a
    hierarchical backbone (FastMIM)."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    segments: int | tuple[int, ...] = 1
    """Block-wise training (BIM): cut the backbone into so many equal segments, each trained by a decoder and loss of its
    own; or the blocks after which a segment ends, for example 3 6 12. Blocks of a ViT, stages of a hierarchical model, as
    --depth counts them."""
    offload: bool = False
    """With --segments: keep only one segment and the next on the GPU; weights, gradients and optimizer state of the
    others wait in host memory. Same numbers, less GPU memory, more time."""
    throw: float = 0.0
    """Partial reconstruction (PR-MIM): share of all patches, masked ones, that the decoder's layers do not see. 0 is
    full reconstruction. With --decoder-depth 0 there are no layers, and little is saved."""
    select: Literal["furthest", "random"] = "furthest"
    """With --throw: which masked patches are decoded, those furthest from each other or random ones."""
    select_start: Literal["visible", "random"] = "visible"
    """With --select furthest: what to be far from at first, all visible patches or one random masked patch."""
    fill: int = 1
    """With --throw: rounds in which thrown patches are filled in from decoded and visible ones, from the second round on
    from each other too, and compared as well. 0 is plain partial reconstruction: thrown patches do not count."""

    epochs: int = 800
    """Passes over the data."""
    batch_size: int | Literal["auto"] = 256
    """Images per process and forward pass. The effective batch is batch_size x accum x processes. auto takes the
    largest that fits --memory by prediction, and accumulates up to --effective-batch."""
    accum: int = 1
    """Forward passes whose gradients are averaged into one step."""
    effective_batch: int = 256
    """With --batch-size auto: images per step, over all processes."""
    memory: str = "auto"
    """With --batch-size auto: memory to stay within, for example 8GiB; auto is what the device has free."""
    blr: float = 1.5e-4
    """Base learning rate: lr = blr x effective batch / 256."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Of the learning rate after the warm-up. cosine: half a cosine to 0. step: constant, and a tenth of it in the last
    eighth (SimMIM)."""
    warmup_share: float = 0.05
    """Linear warm-up, as a share of the epochs (MAE: 40 of 800)."""
    warmup_epochs: float | None = None
    """Linear warm-up in epochs; overrides --warmup-share."""
    weight_decay: float = 0.05
    """AdamW's weight decay; never on biases, norms, tokens and position tables."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    clip_grad: float = 0.0
    """Largest norm of the gradient, of each segment its own; 0 is no clipping."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """RandomResizedCrop: share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height of the crop."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    statistics: Literal["imagenet", "data"] = "imagenet"
    """Mean and standard deviation for normalisation: ImageNet's, or computed from the data."""
    mean: tuple[float, ...] | None = None
    """Given mean, one number per channel, on the scale 0 to 1; overrides statistics."""
    std: tuple[float, ...] | None = None
    """Given standard deviation, one number per channel, on the scale 0 to 1; overrides statistics."""
    max_bad_share: float = 0.1
    """Unreadable files are skipped and listed; a larger share of the folder than this ends the run."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto is bf16 on GPUs that have it, fp32 elsewhere. Targets and losses are fp32."""
    compile: bool = False
    """torch.compile the encoder and decoder: slower start, faster steps."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    workers: int = -1
    """Processes that read images, for each training process; -1 is the CPU count less one, 8 at most."""
    seed: int = 0
    """Seed of weights, order, crops and masks."""

    knn_data: str | None = None
    """Labelled folder (train/CLASS, val/CLASS) for a kNN accuracy during training."""
    knn_every: int = 10
    """Epochs between two kNN accuracies; there is always one at the end."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints, each with a line of metrics.jsonl; 0 is one each step. There is always one at the
    end."""
    overwrite: bool = False
    """Start afresh in a run folder that already holds another run."""

    @property
    def size(self) -> tuple[int, int]:
        """Input height and width, px."""
        return (self.input_size[0], self.input_size[-1])

    @property
    def mask_ratios(self) -> tuple[float, ...]:
        """One for all segments, one for each, or the first's and the last's."""
        return self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio,)

    @property
    def warmup(self) -> float:
        """Resolved warm-up, epochs."""
        return self.warmup_share * self.epochs if self.warmup_epochs is None else self.warmup_epochs

    def to_json(self) -> dict[str, Any]:
        """Plain values only, for config.json and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Pretrain":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        check_size(self.input_size)
        check_ranges(
            self,
            ("throw", 0, 1), ("fill", 0, None), ("epochs", 1, None), ("accum", 1, None), ("effective_batch", 1, None),
            ("hog_cell", 1, None), ("decoder_width", 4, None), ("decoder_heads", 1, None),
            ("mask_unit", 0, None), ("workers", -1, None), ("flip", 0, 1),
            ("max_bad_share", 0, 1), ("knn_every", 1, None), ("log_every", 1, None), ("seed", 0, None),
            ("blr", 0, None), ("weight_decay", 0, None), ("clip_grad", 0, None), ("checkpoint_minutes", 0, None),
        )  # fmt: skip
        if not self.mask_ratios:
            raise UserError("--mask-ratio takes one number, one for each segment, or the first's and the last's")
        for ratio in self.mask_ratios:
            if not 0 <= ratio <= 1:
                raise UserError(f"--mask-ratio {ratio} is out of range; it is at least 0, at most 1")
        if list(self.mask_ratios) != sorted(self.mask_ratios):
            raise UserError(
                f"--mask-ratio {' '.join(map(str, self.mask_ratios))} falls; a later segment cannot see what an earlier one "
                "did not: give ratios that stay or rise"
            )
        if self.offload and self.segments in (1, (1,)):
            raise UserError("--offload keeps one segment of several on the GPU; give --segments, or leave it out")
        count = len(self.stage_scales)
        if len(self.stage_starts) != count:
            raise UserError(
                f"--stage-starts has {len(self.stage_starts)} numbers for {count} --stage-scales; give one each"
            )
        rising = all(low < high for low, high in zip(self.stage_starts, (*self.stage_starts[1:], 1.0), strict=False))
        if count and (self.stage_starts[0] != 0 or not rising or not min(self.stage_scales) > 0):
            raise UserError(
                f"--stage-starts {self.stage_starts} must begin with 0, rise and stay under 1, and --stage-scales "
                f"{self.stage_scales} be above 0"
            )
        for name in ("stage_batches", "stage_accums", "stage_blrs"):
            values = getattr(self, name)
            if values and (len(values) != count or not min(values) > 0):
                raise UserError(
                    f"--{name.replace('_', '-')} {values} must be {count} numbers above 0, one for each stage"
                )
        if self.batch_size == "auto":
            if self.stage_batches or self.stage_accums:
                raise UserError(
                    "--batch-size auto chooses batch and accumulation itself; leave those of the stages out"
                )
            parse_bytes(self.memory)
            if self.accum != 1:
                raise UserError("--batch-size auto chooses --accum itself; leave --accum out, set --effective-batch")
        else:
            check_ranges(self, ("batch_size", 1, None))
        if not 0 <= self.warmup <= self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs} is not between 0 and the {self.epochs} epochs")
        if self.decoder_depth != "auto":
            check_ranges(self, ("decoder_depth", 0, None))
        if self.decoder_depth == 0 and self.masking == "drop":
            raise UserError(
                "--decoder-depth 0 is a linear head on masked tokens, which --masking drop leaves out; "
                "use --masking token, or at least 1 layer"
            )
        if self.decoder_depth and (self.decoder_width % 4 or self.decoder_width % self.decoder_heads):
            raise UserError(
                f"--decoder-width {self.decoder_width} must be a multiple of 4 and of "
                f"--decoder-heads {self.decoder_heads}"
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.channels:
                raise UserError(f"--{name} has {len(value)} numbers for {self.channels} channels; give one for each")
        if (self.mean is None) != (self.std is None):
            raise UserError("give --mean and --std together, or neither")
        if not all(map(math.isfinite, self.mean or ())):
            raise UserError(f"--mean {self.mean} must be finite")
        if not all(0 < value < math.inf for value in self.std or ()):
            raise UserError(f"--std {self.std} must be positive and finite")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            share = name == "crop_scale"
            if not 0 < low <= high or (share and high > 1):
                limits = "0 < low <= high" + " <= 1" * share
                raise UserError(f"--{name.replace('_', '-')} {low} {high} must be {limits}")


@dataclass(frozen=True)
class Knn:
    """Weighted k-nearest-neighbour accuracy of a run's encoder on a labelled folder."""

    run: Positional[str]
    """Run folder of `leanmim pretrain`."""
    data: str
    """Labelled folder with train/CLASS and val/CLASS."""
    k: int = 20
    """Neighbours."""
    temperature: float = 0.07
    """Of the votes' weights, exp(cosine similarity / temperature)."""
    pool: Literal["avg", "token", "timm"] = "avg"
    """Features: mean of the patch tokens, the class token, or what the timm model returns."""
    depth: int | None = None
    """Of a run with --segments: the first blocks or stages only, up to the end of a segment."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number or height and width; empty is the size of pre-training."""
    crop: float | None = None
    """Share of the resized image's side kept by the centre crop; None is 0.875 from 128 px on, 1 below."""
    batch_size: int = 256
    """Images per forward pass."""
    baselines: bool = False
    """Also measure a random encoder and raw pixels."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    workers: int = -1
    """Processes that read images; -1 is the CPU count less one, 8 at most."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        check_size(self.input_size or (1,))
        check_ranges(self, ("k", 1, None), ("temperature", 1e-4, None), ("batch_size", 1, None), ("workers", -1, None))
        if self.crop is not None:
            check_ranges(self, ("crop", 0.01, 1))


@dataclass(frozen=True)
class Probe(Knn):
    """Linear-probe accuracy of a run's encoder: the encoder frozen, BatchNorm without affine, one linear layer."""

    solver: Literal["lars", "fast"] = "lars"
    """lars is MAE's protocol, on augmented images; fast solves logistic regression on features computed once."""
    epochs: int = 90
    """lars: passes over the data."""
    warmup_epochs: int = 10
    """lars: epochs of linear warm-up; then half a cosine to 0."""
    blr: float = 0.1
    """lars: base learning rate; lr = blr x probe batch size / 256."""
    probe_batch_size: int = 16384
    """lars: images per step, gathered over several forward passes; fewer where 78 would not fill an epoch."""
    c: float = 1.0
    """fast: inverse strength of the L2 penalty, as in scikit-learn."""
    seed: int = 0
    """lars: seed of the layer, order and crops."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        super().check()
        check_ranges(
            self, ("epochs", 1, None), ("warmup_epochs", 0, None), ("blr", 0, None), ("probe_batch_size", 2, None),
            ("c", 1e-9, None), ("seed", 0, None),
        )  # fmt: skip


@dataclass(frozen=True)
class Show:
    """Draw original, masked image and reconstruction side by side."""

    run: Positional[str]
    """Run folder of `leanmim pretrain`."""
    images: tuple[str, ...] = ()
    """Image files or folders; empty takes the run's own data."""
    count: int = 8
    """Rows at most."""
    out: str | None = None
    """Picture to write; None is reconstructions.png in the run folder, or reconstructions-block0.png with --block 0."""
    block: int | None = None
    """Of a run with --segments: the segment whose reconstruction is drawn, 0 is the first; None is the last."""
    seed: int = 0
    """Seed of the masks."""


@dataclass(frozen=True)
class Export:
    """Write a run's encoder for other libraries."""

    run: Positional[str]
    """Run folder of `leanmim pretrain`."""
    format: Literal["timm", "transformers"] = "timm"
    """timm: the backbone. transformers: ViTMAEForPreTraining, decoder included (MAE only)."""
    depth: int | None = None
    """Of a run with --segments: the first blocks or stages only, up to the end of a segment. ViT and Swin become shorter
    models closed by the segment's own norm; of other families the whole model is written, its later stages untrained."""
    all_depths: bool = False
    """A model for the end of each segment, in folders depth3, depth6, ... of --out, or export/timm-depth3, ... in the run
    folder."""
    out: str | None = None
    """Folder to write; None is export/FORMAT in the run folder, or export/timm-depth3 for a --depth of 3."""
    overwrite: bool = False
    """Replace files that are already in --out."""


@dataclass(frozen=True)
class Report:
    """One self-contained HTML page about one or several runs."""

    runs: Positional[tuple[str, ...]]
    """Run folders of `leanmim pretrain`."""
    out: str | None = None
    """Page to write; None is report.html in the first run folder."""


@dataclass(frozen=True)
class Cost:
    """What one training step of a recipe costs: FLOPs, parameters, memory. Counted, without running it."""

    recipes: Positional[tuple[str, ...]] = ()
    """Recipes; the first is what the others are compared with. None is all."""
    model: str = "vit_base_patch16_224"
    """timm model name."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs: --model-kwargs patch_size 4 depth 8."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number or height and width; empty is each recipe's own."""
    channels: Literal[1, 3] = 3
    """Image channels."""
    batch_size: int = 256
    """Images of one forward pass."""
    accum: int = 1
    """Forward passes whose gradients are averaged into one step."""
    masking: Literal["drop", "token", "pixel"] | None = None
    """As in pretrain; None is each recipe's own."""
    mask_ratio: float | tuple[float, ...] | None = None
    """As in pretrain; None is each recipe's own."""
    segments: int | tuple[int, ...] | None = None
    """As in pretrain; None is each recipe's own."""
    offload: bool = False
    """As in pretrain."""
    depth: int | None = None
    """As in pretrain."""
    target: Literal["pixels", "raw-pixels", "hog"] | None = None
    """As in pretrain; None is each recipe's own."""
    decoder_depth: int | Literal["auto"] | None = None
    """As in pretrain; None is each recipe's own."""
    decoder_width: int | None = None
    """As in pretrain; None is each recipe's own."""
    decoder_heads: int | None = None
    """As in pretrain; None is each recipe's own."""
    throw: float | None = None
    """As in pretrain; None is each recipe's own."""
    fill: int | None = None
    """As in pretrain; None is each recipe's own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto is bf16 on cuda, fp32 on cpu."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Count as on this device; it need not be there. auto is cuda if there is one."""
    json: bool = False
    """Print JSON, a list with one object for each recipe, instead of a table."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        check_size(self.input_size or (1,))
        check_ranges(self, ("batch_size", 1, None), ("accum", 1, None))


@dataclass(frozen=True)
class Plan:
    """Which recipes fit the memory, at which batch, how long they take on this machine, and the commands."""

    data: str
    """Folder of images."""
    recipes: Positional[tuple[str, ...]] = ()
    """Recipes to look at; none is all."""
    model: str = "vit_small_patch16_224"
    """timm model name."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs: --model-kwargs patch_size 4 depth 8."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number or height and width; empty is each recipe's own."""
    channels: Literal[1, 3] = 3
    """Image channels."""
    memory: str = "auto"
    """Memory to stay within, for example 8GiB; auto is what the device has free."""
    hours: float | None = None
    """Time there is; the plan says how many epochs fit into it."""
    epochs: int | None = None
    """Passes over the data; None is each recipe's own."""
    effective_batch: int = 256
    """Images per step, over several forward passes where they do not fit at once."""
    images_per_second: float | None = None
    """Throughput of the first recipe; the others' follow from their FLOPs. None measures a few real steps of each."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto is bf16 on GPUs that have it, fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training would run; auto takes the GPU if there is one."""
    workers: int = -1
    """Processes that read images; -1 is the CPU count less one, 8 at most."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        check_size(self.input_size or (1,))
        parse_bytes(self.memory)
        check_ranges(self, ("effective_batch", 1, None), ("workers", -1, None))
        for name in ("hours", "epochs", "images_per_second"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0")
