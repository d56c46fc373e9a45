"""Linear probe: the encoder frozen, BatchNorm without affine, one linear layer (MAE, appendix A.1)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.optim import Lars
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.transforms import v2

from leanmim.config import Probe
from leanmim.data import epoch_order, loader, seed_of
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.features import Features, Subject, extract, extract_pair, record, subjects
from leanmim.loop import Loop
from leanmim.processes import ALONE
from leanmim.run import Run
from leanmim.schedule import learning_rate


def fast_probe(train: Features, val: Features, c: float = 1.0) -> Accuracy:
    """Accuracy of logistic regression on standardised features, 0 to 1.

    Standardising by the training set is what BatchNorm without affine has become at the end of training.
    """
    scale = StandardScaler().fit(train.x.cpu().numpy())
    model = LogisticRegression(C=c, max_iter=5000)
    model.fit(scale.transform(train.x.cpu().numpy()), train.y.cpu().numpy())
    right = model.predict(scale.transform(val.x.cpu().numpy())) == val.y.cpu().numpy()
    return Accuracy(int(np.sum(right)), len(right))


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

    def step(self, x: Float[Tensor, "b d"], y: Int[Tensor, "b"], lr: float) -> Float[Tensor, ""]:
        """One step; returns the loss."""
        for group in self.optimizer.param_groups:
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

    An epoch has at least the paper's 78 steps (a batch of 16384 of ImageNet) as far as batches of 64 allow (ours).
    The learning rate stays that of the full batch: LARS steps by the weights' norm, whatever the gradient's.
    Killed, it continues from probe/NAME in the run folder, if the options and the encoder are the same.
    """
    train, device = subject.train, subject.normalise.device
    size = tuple(train[0][0].shape[1:])
    crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    augmented = train.transformed(v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    batch = min(config.probe_batch_size, max(64, len(train) // 78), len(train))
    per_epoch = max(1, len(train) // batch)
    steps, warmup = per_epoch * config.epochs, float(per_epoch * min(config.warmup_epochs, config.epochs))

    run = Run(Path(config.run) / "probe" / subject.name)
    same = not config.changes(run.stored())
    state = run.to_resume(config, overwrite=config.overwrite or not same)
    state = state if state and state["encoder_step"] == subject.step else None
    linear = Linear.restored(state, config.seed, device) if state else None
    start = state["step"] if state else 0
    run.prepare(config, start)

    order = image_order(len(train), config, batch, start, steps)
    feed = loader(augmented, order, subject.workers, device, default_collate)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Loop(run, config, steps, state, ALONE, device, subject.name, console) as loop:
        if start < steps:
            console.print(
                f"{subject.name}: MAE's protocol, {config.epochs} epochs of {len(train)} images, {steps} steps of {batch} "
                "images; --solver fast reads each image once"
            )
        features = gather(loop.timed(iter(feed)), subject, batch)
        for step in loop.until(steps):
            x, y = next(features)
            if linear is None:
                linear = Linear(x.shape[1], len(train.classes), config.seed, device)
            lr = learning_rate(step, steps, warmup, config.blr * config.probe_batch_size / 256)
            loss = linear.step(x, y, lr)
            loop.record(loss[None], images=batch, epoch=(step + 1) / per_epoch, lr=lr)
            if loop.checkpoint_due:
                loop.save({"config": config.to_json(), "encoder_step": subject.step, **linear.state()})
    assert linear is not None
    title = f"{subject.name} features"
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


def gather(feed: Iterator[tuple[Tensor, Tensor]], subject: Subject, batch: int) -> Iterator[Features]:
    """The frozen encoder's features, in batches of the probe."""
    while True:
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        while sum(map(len, ys)) < batch:
            images, labels = next(feed)
            with torch.inference_mode():
                xs.append(subject.embed(subject.normalise(images)).float())
            ys.append(labels.to(subject.normalise.device))
        yield Features(torch.cat(xs).clone(), torch.cat(ys))  # cloned, to be used with autograd


def probe(config: Probe) -> Iterator[tuple[str, Accuracy]]:
    """The accuracy of the run's encoder, and of the baselines where asked for."""
    for subject in subjects(config):
        if config.solver == "lars":
            accuracy = lars_probe(subject, config)
        else:
            train, val = extract_pair(subject, config.batch_size)
            with Console(stderr=True).status(f"{subject.name}: logistic regression on {len(train.y)} features"):
                accuracy = fast_probe(train, val, config.c)
        yield record(config, "probe", subject, accuracy)
