"""The configuration of `leanmim compare`."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from leanmim.config.base import Auto, Machine, Model, check_size, parse_bytes
from leanmim.errors import UserError

Measure = Literal["finetune", "attentive", "linear", "knn"]
MEASURES: tuple[Measure, ...] = ("finetune", "attentive", "linear", "knn")
UNITS: dict[str, tuple[str, float]] = {
    "s": ("seconds", 1), "min": ("seconds", 60), "h": ("seconds", 3600), "epoch": ("epochs", 1), "epochs": ("epochs", 1),
    "gflop": ("flops", 1e9), "tflop": ("flops", 1e12), "pflop": ("flops", 1e15), "eflop": ("flops", 1e18),
}  # fmt: skip


class Budget(NamedTuple):
    """What each pre-training may take."""

    amount: float
    kind: str
    """Of what: ``seconds``, ``epochs`` or ``flops``."""


def parse_budget(text: str) -> Budget:
    """The budget of "30min", "2h", "90s", "8epochs" or "500TFLOP".

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+?)\s*", text, re.IGNORECASE)
    unit = match and UNITS.get(re.sub("flops$", "flop", match[2].lower()))
    if not match or not unit or float(match[1]) <= 0:
        raise UserError(f"--budget {text!r} is no budget; give one as 30min, 2h, 90s, 8epochs or 500TFLOP")
    return Budget(float(match[1]) * unit[1], unit[0])


@dataclass(frozen=True, kw_only=True)
class Compare(Machine, Model):
    """Pre-train several recipes under one budget, evaluate all alike, and say in one page which is worth it."""

    FREE: ClassVar[frozenset[str]] = frozenset({"data", "eval", "out", "workers", "memory", "jobs"})

    recipes: tuple[str, ...]
    """Recipes to compare. Any option of `pretrain` may follow a name: mae "mae:mask-ratio=0.9,decoder-depth=1"."""
    data: str | tuple[str, ...]
    """Images to pre-train on, without labels, as `pretrain` takes them."""
    eval: str
    """Labelled folder to evaluate on, or tar file of one, with train/CLASS and val/CLASS; without val a share is held out."""
    stats: str | None = None
    """File of `leanmim stats --out`, which gives --channels, --values, mean and standard deviation for all."""
    out: str
    """Folder of the comparison: a folder for each training, table and page. The same command again continues it."""

    budget: str = "1h"
    """What the pre-training of each recipe may take: time (90s, 30min, 2h), epochs (8epochs) or training FLOPs (500TFLOP).
    The last epoch may be a part. The epochs of a time follow from the speed, measured once, before the first training."""
    seeds: int = 3
    """Trainings of each recipe, and of the model without pre-training; with one there is no spread."""
    screen: bool = False
    """First train all recipes with a tenth of the budget and one seed, and go on without those whose 95 % interval lies below that
    of the best, by the first of --measures."""
    screen_share: float = 1.0
    """With --screen: go on with at most this share of the recipes, the best ones. 0.5 halves them, though chance may decide which half."""
    depths: bool = False
    """Also evaluate the shallower backbones that a recipe in segments trains: those that end where a segment does."""
    weights: tuple[str, ...] = ()
    """Also evaluate these: timm's names of published weights, run folders, exported folders, checkpoint files of --model. The weights
    that a recipe begins with (--init) are evaluated anyway."""

    measures: tuple[Measure, ...] = MEASURES
    """How to evaluate, the one that decides first: fine-tuning, attentive probe, linear probe, k-nearest neighbours."""
    eval_size: tuple[int, ...] = ()
    """Pixels at which all are evaluated: one number or height and width. Empty is the largest --input-size among the
    recipes."""
    finetune_epochs: int | Auto = "auto"
    """Fine-tuning, by its recipe small: passes over the labelled images. auto is a fifth of that recipe's number."""
    label_share: float | None = None
    """Fine-tuning: train with this share of the labels of each class."""
    labels_per_class: int | None = None
    """Fine-tuning: train with so many labels a class at most."""

    workers: int = -1
    """Processes that read images, for each training. -1 is none on a CPU, whose cores all compute, and with a GPU its share of the CPU's
    cores less one."""
    jobs: int | Auto = "auto"
    """Trainings side by side. auto is one for each core of a CPU, or one for each GPU, but no more than there are trainings of recipes;
    they share out the cores."""
    memory: str = "auto"
    """Memory of each training, for example 8GiB; auto is what is free, shared among those side by side."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        parse_budget(self.budget)
        parse_bytes(self.memory)
        check_size(self.eval_size or (1,))
        for name in ("recipes", "measures"):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty; name one or several")
        if self.label_share is not None and self.labels_per_class is not None:
            raise UserError("--label-share and --labels-per-class are two ways to choose labels; leave one out")
        if self.screen_share < 1 and not self.screen:
            raise UserError("--screen-share is for --screen; give that too, or leave it out")
        if self.label_share == 0:
            raise UserError("--label-share 0 leaves no labels; give a share above 0")
