"""Linear probe: the encoder frozen, BatchNorm without affine, one linear layer (MAE, appendix A.1)."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.optim import Lars
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.transforms import v2

from leanmim.config import Probe
from leanmim.data import Labelled, epoch_order, loader, seed_of
from leanmim.evaluate.features import Features, Subject, extract, record, subjects
from leanmim.schedule import learning_rate


def fast_probe(train: Features, val: Features, c: float = 1.0) -> float:
    """Accuracy of logistic regression on standardised features, 0 to 1.

    Standardising by the training set is what BatchNorm without affine has become at the end of training.
    """
    scale = StandardScaler().fit(train.x.cpu().numpy())
    model = LogisticRegression(C=c, max_iter=5000)
    model.fit(scale.transform(train.x.cpu().numpy()), train.y.cpu().numpy())
    return float(np.mean(model.predict(scale.transform(val.x.cpu().numpy())) == val.y.cpu().numpy()))


def lars_probe(subject: Subject, config: Probe) -> float:
    """Accuracy by MAE's protocol, 0 to 1: LARS on RandomResizedCrop and flip, warm-up and half-cosine.

    An epoch has at least the paper's 78 steps (a batch of 16384 of ImageNet) as far as batches of 64 allow (ours).
    The learning rate stays that of the full batch: LARS steps by the weights' norm, whatever the gradient's.
    """
    train, device = subject.train, subject.normalise.device
    size = tuple(train[0][0].shape[1:])
    crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    augmented = Labelled(train.folder, train.channels, augment, train.classes)
    batch = min(config.probe_batch_size, max(64, len(train) // 78), len(train))
    chunk = min(config.batch_size, batch)
    per_epoch = max(1, len(train) // batch)
    steps, warmup = per_epoch * config.epochs, float(per_epoch * min(config.warmup_epochs, config.epochs))

    def passes() -> Iterator[list[tuple[int, int]]]:
        for epoch in range(config.epochs):
            order = epoch_order(len(train), config.seed, epoch)
            for step in range(per_epoch):
                for part in order[step * batch : (step + 1) * batch].split(chunk):
                    yield [(seed_of(config.seed, epoch, index), index) for index in part.tolist()]

    feed = iter(loader(augmented, passes(), subject.workers, device, default_collate))
    head: nn.Module | None = None
    for step in range(steps):
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        while sum(len(y) for y in ys) < batch:
            images, labels = next(feed)
            with torch.inference_mode():
                xs.append(subject.embed(subject.normalise(images)).float())
            ys.append(labels.to(device))
        x, y = torch.cat(xs).clone(), torch.cat(ys)
        if head is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                linear = nn.Linear(x.shape[1], len(train.classes))
                nn.init.trunc_normal_(linear.weight, std=0.01)
                nn.init.zeros_(linear.bias)
            head = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6), linear).to(device)
            # Without weight decay timm's Lars is plain SGD unless told; MAE's adapts weights always, biases never.
            groups = [{"params": linear.weight, "always_adapt": True}, {"params": linear.bias}]
            optimizer = Lars(groups, lr=0.0, momentum=0.9)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, config.blr * config.probe_batch_size / 256)
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert head is not None
    val = extract(subject.embed, subject.val, subject.normalise, config.batch_size, subject.workers)
    with torch.inference_mode():
        return float((head.eval()(val.x).argmax(1) == val.y).float().mean())


def probe(config: Probe) -> Iterator[tuple[str, float]]:
    """The accuracy of the run's encoder, and of the baselines where asked for."""
    for subject in subjects(config):
        if config.solver == "lars":
            accuracy = lars_probe(subject, config)
        else:
            train, val = (
                extract(subject.embed, data, subject.normalise, config.batch_size, subject.workers)
                for data in (subject.train, subject.val)
            )
            accuracy = fast_probe(train, val, config.c)
        yield record(config, "probe", subject, accuracy)
