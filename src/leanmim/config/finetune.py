"""The configuration of `leanmim finetune`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tyro.conf import Positional

from leanmim.config.base import (
    AGAINST_DIVERGENCE,
    FREE_IN_TRAINING,
    Auto,
    Computing,
    Faults,
    Images,
    Logging,
    Number,
    Optimisation,
    check_model,
    check_pair,
    check_size,
)
from leanmim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Finetune(Logging, Faults, Computing, Optimisation, Images):
    """Everything that defines a fine-tuning. The recipes are values of this class; ``auto`` is the recipe's number."""

    FREE: ClassVar[frozenset[str]] = FREE_IN_TRAINING | {"start", "eval_every"}
    ADJUSTABLE: ClassVar[frozenset[str]] = AGAINST_DIVERGENCE
    LEFT_EMPTY: ClassVar[frozenset[str]] = frozenset({"start", "data", "out"})

    start: Positional[str]
    """A run folder of `leanmim pretrain` or `leanmim finetune`, an exported folder, a checkpoint file of timm (with --model),
    timm's name of published weights, or scratch (with --model): a random initialisation, the baseline to beat."""
    data: str
    """Labelled folder, or tar file of one, with train/CLASS and val/CLASS, or a labelled dataset of Hugging Face. Without val, or with
    class folders only, a share of the images is held out (--val-share)."""
    out: str
    """Run folder. The same command again continues the run in it."""
    recipe: str = "auto"
    """mae, simmim-swin, fastmim or fastmim-swin: as published; small: for hundreds to thousands of images. auto is small below
    20,000 training images, above it that of the start."""

    model: str | None = None
    """timm's name of the architecture; for a checkpoint file and scratch."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs; for a checkpoint file and scratch."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number for a square, or height and width. Empty is the start's own."""
    depth: int | None = None
    """Only the first blocks or stages: of a run with --segments, up to the end of a segment."""
    pool: Literal["auto", "avg", "token"] = "auto"
    """Of a ViT: mean of the patch tokens and a fresh norm (MAE), or the class token and the trained norm. auto is the mean for
    a leanmim run and scratch, and what the model has for other weights."""

    label_share: float | None = None
    """Train with this share of the labels of each class, at least one; the chosen files are recorded."""
    labels_per_class: int | None = None
    """Train with so many labels a class at most."""
    val_share: float = 0.1
    """Where there is no val folder: the share of each class that is held out."""
    class_weights: Literal["auto", "none", "balanced"] = "auto"
    """Weight of each class in the loss: none, or the inverse of its share of the images. auto is balanced where the largest
    class has more than three times the images of the smallest."""

    epochs: int | float | Auto = "auto"
    """Passes over the training images, the last of which may be a part. auto is the recipe's number, or as many as fit into --hours if they are fewer."""
    hours: float | None = None
    """With --epochs auto: the time there is; without, the recipe's epochs take what they take."""
    effective_batch: int | Auto = "auto"
    """With --batch-size auto: images per step, over all processes. auto is the recipe's number, at most all there are."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after the warm-up. cosine: half a cosine to --min-lr. constant: constant, then linear to --min-lr in
    the last fifth."""
    blr: float | Auto = "auto"
    """Base learning rate: lr = blr x effective batch / 256."""
    warmup_share: float | Auto = "auto"  # type: ignore[assignment]  # pre-training has no auto
    """Linear warm-up, as a share of the epochs."""
    weight_decay: float | Auto = "auto"  # type: ignore[assignment]
    """AdamW's weight decay; never on biases, norms, tokens, nor on what the backbone itself exempts."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    clip_grad: float | Auto = "auto"  # type: ignore[assignment]
    """Largest norm of the gradient; 0 is no clipping."""
    min_lr: float | Auto = "auto"
    """Learning rate at the end of the schedule."""
    layer_decay: float | Auto = "auto"
    """The learning rate of a layer is that of the layer above times this."""
    drop_path: float | Auto = "auto"
    """Stochastic depth: the rate of the last block; it rises linearly."""
    mixup: float | Auto = "auto"
    """Mixup's alpha; 0 is no Mixup."""
    cutmix: float | Auto = "auto"
    """CutMix's alpha; 0 is no CutMix."""
    mixup_switch: float = 0.5
    """Probability of CutMix where both are on."""
    smoothing: float | Auto = "auto"
    """Label smoothing."""
    randaugment: str = "auto"
    """timm's string, as rand-m9-mstd0.5-inc1; none is none. It is for 8-bit images: auto is none for stored values."""
    erase: float | Auto = "auto"
    """Probability of random erasing."""
    crop_scale: tuple[float, float] | Auto = "auto"
    """RandomResizedCrop: share of the image's area."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    ema: float | Auto = "auto"
    """Decay of the moving average of the weights, which is then evaluated and kept; 0 is none."""
    head_init: float = 2e-5
    """Standard deviation of the new head's weights."""
    crop: float | None = None
    """Evaluation: share of the resized image's side kept by the centre crop; None is 0.875 from 128 px on, 1 below."""

    eval_every: int | Auto = "auto"
    """Epochs between two evaluations; there is always one at the end. auto is as many as the validation images are times
    the training images, at least one."""

    seed: int = 0
    """Seed of the head, the split, the order, the augmentations."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_size(self.input_size or (1,))
        check_model(self.model, self.model_kwargs)
        if self.label_share is not None and self.labels_per_class is not None:
            raise UserError("--label-share and --labels-per-class are two ways to choose labels; leave one out")
        if self.label_share == 0:
            raise UserError("--label-share 0 leaves no labels; give a share above 0")
        check_pair("crop_scale", self.crop_scale)
