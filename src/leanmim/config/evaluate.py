"""The configurations of the evaluators of a frozen encoder."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Positional

from leanmim.config.base import Logging, Machine, Pool, check_ranges, check_size


@dataclass(frozen=True, kw_only=True)
class Evaluate(Machine):
    """What all evaluators of a run need."""

    run: Positional[str]
    """Run folder of `leanmim pretrain`."""
    data: str
    """Labelled folder with train/CLASS and val/CLASS."""
    pool: Pool = "avg"
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

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        check_size(self.input_size or (1,))
        check_ranges(self, ("batch_size", 1, None), ("workers", -1, None))
        if self.crop is not None:
            check_ranges(self, ("crop", 0.01, 1))


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluate):
    """Weighted k-nearest-neighbour accuracy of a run's encoder on a labelled folder."""

    k: int = 20
    """Neighbours."""
    temperature: float = 0.07
    """Of the votes' weights, exp(cosine similarity / temperature)."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_ranges(self, ("k", 1, None), ("temperature", 1e-4, None))


@dataclass(frozen=True, kw_only=True)
class Probe(Logging, Evaluate):
    """Linear-probe accuracy of a run's encoder: the encoder frozen, BatchNorm without affine, one linear layer."""

    FREE: ClassVar[frozenset[str]] = frozenset({"run", "workers", "overwrite", "checkpoint_minutes", "baselines"})

    solver: Literal["fast", "lars"] = "fast"
    """fast solves logistic regression on features computed once. lars is MAE's protocol: augmented images, read again
    in each epoch, which takes far longer."""
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
        """Raise UserError for an impossible value."""
        super().check()
        check_ranges(
            self, ("epochs", 1, None), ("warmup_epochs", 0, None), ("blr", 0, None), ("probe_batch_size", 2, None),
            ("c", 1e-9, None), ("seed", 0, None), ("log_every", 1, None), ("checkpoint_minutes", 0, None),
        )  # fmt: skip
