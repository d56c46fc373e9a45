"""The configurations of the evaluators of a frozen encoder."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from leanmim.config.base import Auto, Images, Logging, Machine, Number, Pool, check_model, check_size
from leanmim.errors import UserError

TRIVIAL = ("random", "pixels")
Baselines = Annotated[
    tuple[str, ...] | bool,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[WORD ...]",
        instance_from_str=lambda words: tuple(words) or TRIVIAL,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Evaluator(Machine, Images):
    """What all evaluators of an encoder need."""

    run: Positional[str]
    """Run folder of `leanmim pretrain` or `leanmim finetune`; or an exported folder, a checkpoint file of timm (with --model),
    timm's name of published weights, or scratch (with --model). Results and features are kept in run folders only."""
    data: str
    """Labelled folder, or tar file of one, with train/CLASS and val/CLASS, or a labelled dataset of Hugging Face. Without val the
    images are held out that `leanmim finetune` holds out by its default --seed and --val-share."""
    model: str | None = None
    """timm's name of the architecture; for a checkpoint file and scratch."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs; for a checkpoint file and scratch."""
    pool: Pool | Auto = "auto"
    """Features: avg, the mean of the patch tokens; token, the class token; timm, what the timm model returns. auto is the mean;
    for the probe with --solver lars the class token where there is one (MAE)."""
    depth: int | None = None
    """Only the first blocks or stages: of a run with --segments, up to the end of a segment."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number or height and width; empty is each encoder's own."""
    crop: float | None = None
    """Share of the resized image's side kept by the centre crop; None is 0.875 from 128 px on, 1 below."""
    batch_size: int = 256
    """Images per forward pass."""
    baselines: Baselines = ()
    """Also measure: random, the same model at random; pixels, the raw pixels; or other encoders, named as the run is. Without
    words: random and pixels."""
    cache: bool = True
    """Keep the features in the run folder (cache/), and use those that are there if weights, files and options are the same."""

    def __post_init__(self) -> None:
        """True stands for the trivial baselines, False for none."""
        if isinstance(self.baselines, bool):
            object.__setattr__(self, "baselines", TRIVIAL if self.baselines else ())
        super().__post_init__()

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_size(self.input_size or (1,))
        check_model(self.model, self.model_kwargs)


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluator):
    """Weighted k-nearest-neighbour accuracy of an encoder on a labelled folder."""

    k: int = 20
    """Neighbours."""
    temperature: float = 0.07
    """Of the votes' weights, exp(cosine similarity / temperature)."""


@dataclass(frozen=True, kw_only=True)
class Probe(Logging, Evaluator):
    """Accuracy of a probe of a frozen encoder: a linear layer, or an attentive pooling and a linear layer."""

    FREE: ClassVar[frozenset[str]] = frozenset(
        {"run", "workers", "overwrite", "checkpoint_minutes", "keep", "baselines", "cache", "queries"}
    )

    solver: Literal["fast", "lars", "attentive"] = "fast"
    """fast solves logistic regression on features computed once. lars is MAE's protocol: augmented images, read again
    in each epoch, which takes far longer. attentive is efficient probing: learned queries pool the patch tokens, which are
    computed once."""
    epochs: int = 90
    """lars, attentive: passes over the data."""
    warmup_epochs: int = 10
    """lars, attentive: epochs of linear warm-up, a ninth of all at most; then half a cosine to 0."""
    blr: float | Auto = "auto"
    """lars: base learning rate; lr = blr x images of a step / 256. auto is MAE's 0.1, with the rate of its batch of 16384 for
    the weights, whose steps LARS adapts, and that of the batch at hand for the bias. attentive chooses its own on held-out
    images."""
    probe_batch_size: int = 16384
    """lars: images per step, gathered over several forward passes; fewer where 78 would not fill an epoch."""
    c: float | Auto = 1.0
    """fast: inverse strength of the L2 penalty, as in scikit-learn; auto chooses by cross-validation on the training images."""
    queries: int = 32
    """attentive: learned queries at most; their number divides the width of the tokens."""
    seed: int = 0
    """Of the layers, the order, the crops, the held-out images."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Evaluator):
    """All measures of a frozen encoder in one table: kNN, linear probe at several layers, attentive probe, few-shot; with
    --masks, kNN and linear probe of patches."""

    LEFT_EMPTY: ClassVar[frozenset[str]] = frozenset({"data"})

    data: str = ""
    """Labelled folder, or tar file of one, with train/CLASS and val/CLASS, or a labelled dataset of Hugging Face. Without val the
    images are held out that `leanmim finetune` holds out by its default --seed and --val-share. Empty is none: --masks only."""
    masks: str | None = None
    """Folder of images with segmentation masks: train/images, train/masks, val/images, val/masks, or images/train and so on. A mask has its image's name and
    size; it is a grey PNG, or one with a palette, whose values are classes."""
    void: tuple[int, ...] = (255,)
    """Masks: values that are no class; their pixels do not count."""
    patches: int = 50_000
    """Masks: patches of the training images that vote and are fitted, at most; of more so many are drawn."""
    k: tuple[int, ...] = (1, 5, 10, 20, 50, 200)
    """kNN: neighbours, as far as there are images, or patches."""
    temperature: float = 0.07
    """kNN: of the votes' weights, exp(cosine similarity / temperature)."""
    c: float | Auto = 1.0
    """Linear probe: inverse strength of the L2 penalty; auto chooses by cross-validation on the training images."""
    layers: tuple[int, ...] = ()
    """Linear probe: also after so many blocks or stages. Empty is a quarter, a half and three quarters of them; 0 is none."""
    attentive: bool = True
    """The attentive probe too, which takes the longest, and keeps all patch tokens on disk: of a ViT-B
    at 224 px 0.3 MB an image."""
    queries: int = 32
    """Attentive probe: learned queries at most; their number divides the width of the tokens."""
    epochs: int = 90
    """Attentive probe: passes over the tokens."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Few-shot: training images of each class, as far as every class has them."""
    draws: int = 10
    """Few-shot: how often they are drawn."""
    seed: int = 0
    """Of the draws, the attentive probe's layers, order and held-out images."""

    def check(self) -> None:
        """Raise UserError for an impossible value, or nothing to measure on."""
        super().check()
        if not self.data and self.masks is None:
            raise UserError("give --data, a labelled folder, or --masks, a folder of images with masks, or both")
