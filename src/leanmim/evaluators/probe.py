"""Linear probe: the encoder frozen, BatchNorm without affine, one linear layer (MAE, appendix A.1). And the attentive one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.markup import escape
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.optim import Lars
from torch import Tensor, nn
from torchvision.transforms import v2

from leanmim.config import Probe
from leanmim.data import Bad, epoch_order, loader, seed_of
from leanmim.data.crops import resized
from leanmim.data.read import cut_whole
from leanmim.data.readable import collate_readable
from leanmim.data.source import nothing_readable
from leanmim.errors import UserError
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.attentive import Tokens, attentive_probe
from leanmim.evaluators.cache import KEPT, TOKENS, Store, digest_of_weights, storage
from leanmim.evaluators.features import Features, Subject, extract, record, run_folder, subjects
from leanmim.files import writable
from leanmim.loop import Loop
from leanmim.processes import ALONE
from leanmim.progress import console_of, working
from leanmim.run import Run
from leanmim.schedule import learning_rate

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of which --c auto chooses
FOLDS = 5
MAE_BLR, MAE_BATCH = 0.1, 16384


def fast_probe(train: Features, val: Features, c: float | str = 1.0) -> Accuracy:
    """Accuracy of logistic regression on standardised features, 0 to 1.

    Standardising by the training set is what BatchNorm without affine has become at the end of training.

    Args:
        train: features to fit.
        val: features to classify.
        c: inverse strength of the L2 penalty; ``auto`` chooses by stratified cross-validation on the training features.
    """
    model = logistic_regression(train, c)
    right = model.predict(val.x.cpu().numpy()) == val.y.cpu().numpy()
    return Accuracy(int(np.sum(right)), len(right))


def logistic_regression(train: Features, c: float | str) -> Any:
    """scikit-learn's, fitted to standardised features; arguments as for `fast_probe`."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0 if c == "auto" else float(c), max_iter=5000))
    x, y = train.x.cpu().numpy(), train.y.cpu().numpy()
    folds = min(FOLDS, int(np.unique(y, return_counts=True)[1].min()))
    if c == "auto" and folds > 1:  # with one image of a class there is nothing to hold out: 1.0 it is
        cut = StratifiedKFold(folds, shuffle=True, random_state=0)
        model = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=cut)
    return model.fit(x, y)


def attentive(subject: Subject, store: Store, queries: int, epochs: int, warmup_epochs: int, seed: int) -> Accuracy:
    """Accuracy of efficient probing, 0 to 1, on the subject's patch tokens.

    Raises:
        UserError: it has none.
    """
    if subject.backbone is None:
        raise UserError(
            f"--solver attentive needs patch tokens, which {subject.name} have not; leave this baseline out"
        )
    device = subject.normalise.device
    train, val = (
        Tokens(arrays[TOKENS], data.labels_of(arrays[KEPT].tolist()).to(device))
        for data in (subject.train, subject.val)
        for arrays in [store.arrays(subject, data, [TOKENS])]
    )
    return attentive_probe(train, val, queries, epochs, warmup_epochs, seed, title=escape(subject.name))


class LoopFreeCrop(nn.Module):
    """RandomResizedCrop of MAE's linear probe: one draw of area and ratio, cut down to the image.

    torchvision's draws again, up to ten times, until the crop fits, which makes crops of wide photos smaller.

    Args:
        size: height and width, px.
        scale: share of the image's area.
        ratio: width by height.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        super().__init__()
        self.size, self.scale, self.ratio = size, scale, ratio

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop."""
        area = height * width * float(torch.empty(1).uniform_(*self.scale))
        ratio = float(torch.empty(1).uniform_(*np.log(self.ratio).tolist()).exp())
        w, h = max(1, min(width, round((area * ratio) ** 0.5))), max(1, min(height, round((area / ratio) ** 0.5)))
        top, left = (int(torch.randint(0, free + 1, (1,))) for free in (height - h, width - w))
        return top, left, h, w

    def forward(self, image: Any) -> Any:
        """A crop at the size."""
        if isinstance(image, np.ndarray):  # stored values
            top, left, h, w = self.box(*image.shape[:2])
            return resized(cut_whole(image, lambda *_: (left, top, left + w, top + h)), self.size, "bicubic")
        box = self.box(image.height, image.width)
        how = v2.InterpolationMode.BICUBIC
        return v2.functional.resized_crop(image, *box, size=list(self.size), interpolation=how, antialias=True)


class Linear:
    """What the probe trains: BatchNorm without affine, one linear layer; and its optimizer.

    Args:
        width: of the features.
        classes: how many.
        seed: of the layer.
        device: of the features.
    """

    def __init__(self, width: int, classes: int, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            linear = nn.Linear(width, classes)
            nn.init.trunc_normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear).to(device)
        # Without weight decay timm's Lars is plain SGD unless told; MAE's adapts weights always, biases never.
        groups = [{"params": linear.weight, "always_adapt": True}, {"params": linear.bias}]
        self.optimizer = Lars(groups, lr=0.0, momentum=0.9)

    def step(self, x: Float[Tensor, "b d"], y: Int[Tensor, "b"], *lrs: float) -> Float[Tensor, ""]:
        """One step at the learning rates of weights and bias; returns the loss."""
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        loss = nn.functional.cross_entropy(self.head(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.inference_mode()
    def accuracy(self, features: Features) -> Accuracy:
        """Share that is right, 0 to 1."""
        right = self.head.eval()(features.x).argmax(1) == features.y
        return Accuracy(int(right.sum()), len(right))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    @classmethod
    def restored(cls, state: dict[str, Any], seed: int, device: torch.device) -> "Linear":
        """From a checkpoint."""
        classes, width = state["head"]["1.weight"].shape
        linear = cls(width, classes, seed, device)
        linear.head.load_state_dict(state["head"])
        linear.optimizer.load_state_dict(state["optimizer"])
        return linear


def lars_probe(subject: Subject, config: Probe) -> Accuracy:
    """Accuracy by MAE's protocol, 0 to 1: LARS on RandomResizedCrop and flip, warm-up and half-cosine.

    An epoch has at least the paper's 78 steps (a batch of 16384 of ImageNet) as far as batches of 64 allow (ours). A given
    --blr x batch / 256 is the learning rate. By itself (ours) the weights keep that of the paper's batch, since LARS adapts
    their steps to their norm and so few steps at the rate of a small batch do not get them anywhere; the bias, which LARS does
    not adapt, has that of the batch.
    Killed, it continues from probe/NAME in the run folder, if the options and the encoder are the same.
    """
    with probe_folder(config, subject) as folder:
        return lars_in(Run(folder), subject, config)


@contextmanager
def probe_folder(config: Probe, subject: Subject) -> Iterator[Path]:
    """Where the probe's checkpoints go: into the run folder; without one they last no longer than the command."""
    if (folder := run_folder(config)) is not None and writable(folder / "probe"):
        yield folder / "probe" / subject.name.replace("/", "_")
        return
    with TemporaryDirectory() as temporary:
        yield Path(temporary)


def lars_in(run: Run, subject: Subject, config: Probe) -> Accuracy:
    """`lars_probe` in a folder, from the checkpoint there if it is of the same options and encoder."""
    train, device = subject.train, subject.normalise.device
    augmented = train.transformed(v2.Compose([LoopFreeCrop(subject.size), v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    batch = min(config.probe_batch_size, max(64, len(train) // 78), len(train))
    per_epoch = max(1, len(train) // batch)
    steps, warmup = per_epoch * config.epochs, per_epoch * min(float(config.warmup_epochs), config.epochs / 9)
    own = MAE_BLR if config.blr == "auto" else float(config.blr)
    peaks = [own * images / 256 for images in (MAE_BATCH if config.blr == "auto" else batch, batch)]

    same = not config.changes(run.stored())
    state = run.to_resume(config, overwrite=config.overwrite or not same)
    weights = digest_of_weights(subject.backbone)
    state = state if state and state.get("encoder") == weights else None
    linear = Linear.restored(state, config.seed, device) if state else None
    start = state["step"] if state else 0
    run.prepare(config, start)

    order = image_order(len(train), config, batch, start, steps)
    feed = loader(augmented.pictures, order, subject.workers, device, collate_readable)
    console, name = console_of(stderr=True), escape(subject.name)
    with Loop(run, config, steps, state, ALONE, device, name, console) as loop:
        if start < steps:
            console.print(
                f"{subject.name}: MAE's protocol, {config.epochs} epochs of {len(train)} images, {steps} steps of {batch} "
                f"images, lr {peaks[0]:g}, of the bias {peaks[1]:g}; --solver fast reads each image once"
            )
        features = gather(loop.timed(iter(feed)), subject, batch)
        for step in loop.until(steps):
            x, y = next(features)
            if linear is None:
                linear = Linear(x.shape[1], len(train.classes), config.seed, device)
            lrs = [learning_rate(step, steps, warmup, peak) for peak in peaks]
            loss = linear.step(x, y, *lrs)
            loop.record(loss[None], images=batch, epoch=(step + 1) / per_epoch, lr=lrs[0])
            if loop.checkpoint_due:
                loop.save({"config": config.to_json(), "encoder": weights, **linear.state()})
    assert linear is not None
    title = f"{name} features"
    val = extract(subject.embed, subject.val, subject.normalise, config.batch_size, subject.workers, title=title)
    return linear.accuracy(val)


def image_order(count: int, config: Probe, batch: int, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
    """The images of steps ``start`` to ``stop``, in chunks of a forward pass, as (seed, index)."""
    per_epoch = max(1, count // batch)
    for step in range(start, stop):
        epoch, k = divmod(step, per_epoch)
        order = epoch_order(count, config.seed, epoch)
        for chunk in order[k * batch : (k + 1) * batch].split(min(config.batch_size, batch)):
            yield [(seed_of(config.seed, epoch, index), index) for index in chunk.tolist()]


def gather(feed: Iterator[tuple[Tensor, list[int], list[Bad]]], subject: Subject, batch: int) -> Iterator[Features]:
    """The frozen encoder's features, in batches of the probe; images that cannot be read are left out of theirs."""
    while True:
        xs: list[Tensor] = []
        kept: list[int] = []
        unreadable: list[Bad] = []
        while len(kept) + len(unreadable) < batch:
            images, places, bad = next(feed)
            kept, unreadable = kept + places, unreadable + bad
            if places:
                with torch.inference_mode():
                    xs.append(subject.embed(subject.normalise(images)).float())
        if not kept:
            raise nothing_readable(batch, unreadable[0])
        labels = subject.train.labels_of(kept).to(subject.normalise.device)
        yield Features(torch.cat(xs).clone(), labels)  # cloned, to be used with autograd


def probe(config: Probe) -> Iterator[tuple[str, Accuracy]]:
    """The accuracy of the encoder, and of the baselines where asked for."""
    with storage(config) as store:
        for subject in subjects(config):
            if config.solver == "attentive":
                own = attentive(subject, store, config.queries, config.epochs, config.warmup_epochs, config.seed)
                yield record(config, "attentive", subject, own)
                continue
            if config.solver == "lars":
                accuracy = lars_probe(subject, config)
            else:
                train, val = store.pair(subject)
                with working(f"{escape(subject.name)}: logistic regression on {len(train.y)} features"):
                    accuracy = fast_probe(train, val, config.c)
            yield record(config, "probe", subject, accuracy)
