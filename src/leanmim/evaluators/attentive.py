"""Attentive probe: efficient probing (Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of
Efficiency", ICLR 2026, arXiv 2506.10178), written from the paper.

Published: M = 32 learned queries act on the frozen patch tokens themselves, without a key projection: the attention of query
m is the softmax over the patches of q_m . x / sqrt(d). A linear map without bias gives values of d dimensions, cut into M
parts, each of which is summed by an attention of its own. BatchNorm without affine, then one linear layer. LARS with momentum
0.9 and no weight decay, 90 epochs, warm-up of 10, half a cosine to 0.

Ours: the tokens are computed once, of centre crops, where the paper augments 4096 images a step. A step has a sixteenth of the
images, 32 at least and 1024 at most; so few steps need another learning rate, which is chosen on a held-out fifth of the
training images. Weights are those of the last epoch; the paper's repository reports the best epoch on validation images.

b batch, n patches, d width, m queries, k classes.
"""

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.model_selection import train_test_split
from timm.optim import Lars
from torch import Tensor, nn

from leanmim.data import epoch_order
from leanmim.evaluators.accuracy import Accuracy
from leanmim.progress import track
from leanmim.schedule import learning_rate

RATES = (4.0, 16.0, 64.0)  # lr of LARS, which steps by the weights' norm
HELD_OUT = 0.2


class Tokens(NamedTuple):
    """Patch tokens of a set, which may lie on disk, and its labels."""

    x: np.ndarray  # b n d
    y: Int[Tensor, "b"]

    def batch(self, rows: Int[Tensor, "b"]) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b"]]:
        """Some of the images, in float32, on the device of the labels."""
        device = self.y.device
        return torch.from_numpy(self.x[rows.numpy()]).to(device).float(), self.y[rows.to(device)]


class AttentiveProbe(nn.Module):
    """Efficient probing.

    Args:
        width: of the tokens.
        classes: how many.
        queries: at most; as many as divide the width.
    """

    def __init__(self, width: int, classes: int, queries: int = 32) -> None:
        super().__init__()
        count = next(m for m in range(min(queries, width), 0, -1) if width % m == 0)
        self.queries = nn.Parameter(0.02 * torch.randn(count, width))
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.classifier = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def attention(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m n"]:
        """How much each query takes of each patch."""
        return (self.queries @ x.transpose(1, 2) / sqrt(x.shape[2])).softmax(2)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b k"]:
        """Logits.

        The tokens are summed before they are mapped to values, which is the same, the map being linear, and costs one map an
        image where there were n.
        """
        m, d = self.queries.shape
        pooled = self.attention(x) @ x  # b m d
        parts = self.value.weight.view(m, d // m, d)
        return self.classifier(self.norm(torch.einsum("bmd,mpd->bmp", pooled, parts).flatten(1)))


class Training:
    """The probe and its optimizer.

    Args:
        width: of the tokens.
        classes: how many.
        queries: at most.
        seed: of the weights.
        device: of the tokens.
    """

    def __init__(self, width: int, classes: int, queries: int, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.probe = AttentiveProbe(width, classes, queries).to(device)
        # as in the linear probe: weights by the trust ratio, biases as they are
        weights = [p for p in self.probe.parameters() if p.ndim > 1]
        biases = [p for p in self.probe.parameters() if p.ndim == 1]
        self.optimizer = Lars([{"params": weights, "always_adapt": True}, {"params": biases}], lr=0.0, momentum=0.9)

    def step(self, x: Float[Tensor, "b n d"], y: Int[Tensor, "b"], lr: float) -> Float[Tensor, ""]:
        """One step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = nn.functional.cross_entropy(self.probe(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.inference_mode()
    def right(self, data: Tokens, rows: Int[Tensor, "b"]) -> int:
        """How many of these images are classified right."""
        self.probe.eval()
        parts = (data.batch(part) for part in rows.split(256))
        right = sum(int((self.probe(x).argmax(1) == y).sum()) for x, y in parts)
        self.probe.train()
        return right


def attentive_probe(
    train: Tokens,
    val: Tokens,
    queries: int = 32,
    epochs: int = 90,
    warmup_epochs: int = 10,
    seed: int = 0,
    rates: Sequence[float] = (),
    title: str = "",
) -> Accuracy:
    """Accuracy of efficient probing, 0 to 1; the learning rate is chosen on held-out training images.

    Args:
        train: tokens to train with.
        val: tokens to classify; nothing is chosen by them.
        queries: at most.
        epochs: of each training.
        warmup_epochs: of these, but a ninth at most, as published: fewer epochs would be nothing but warm-up.
        seed: of the weights, the order, the held-out images.
        rates: learning rates to choose from; one needs no choice. Empty is `RATES`.
        title: of the progress bar.
    """
    rates, every = rates or RATES, torch.arange(len(train.y))
    kept, held = split(train.y, seed)
    plan = [(kept, rate) for rate in rates] if len(rates) > 1 and len(held) else []
    total = epochs * (len(plan) + 1)

    def trained(rows: Int[Tensor, "b"], rate: float) -> Iterator[Training]:
        return fit(train, rows, rate, queries, epochs, warmup_epochs, seed)

    def run() -> Iterator[Training]:
        scores = []
        for rows, rate in plan:
            for training in trained(rows, rate):
                yield training
            scores.append(training.right(train, held))
        yield from trained(every, rates[scores.index(max(scores))] if scores else rates[0])

    *_, last = track(run(), f"{title} attentive probe".strip(), total)
    return Accuracy(last.right(val, torch.arange(len(val.y))), len(val.y))


def split(y: Int[Tensor, "b"], seed: int) -> tuple[Int[Tensor, "a"], Int[Tensor, "h"]]:
    """Images to train with, and a stratified share that is held out; none where a class has one image only."""
    labels = y.cpu().numpy()
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2 or len(labels) * HELD_OUT < len(classes):
        return torch.arange(len(y)), torch.arange(0)
    kept, held = train_test_split(np.arange(len(y)), test_size=HELD_OUT, stratify=labels, random_state=seed)
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held))


def fit(
    data: Tokens, rows: Int[Tensor, "b"], rate: float, queries: int, epochs: int, warmup_epochs: int, seed: int
) -> Iterator[Training]:
    """Train; yields after each epoch."""
    training = Training(data.x.shape[2], int(data.y.max()) + 1, queries, seed, data.y.device)
    batch = min(max(32, min(1024, len(rows) // 16)), len(rows))
    per_epoch = len(rows) // batch
    steps, warmup = per_epoch * epochs, per_epoch * min(float(warmup_epochs), epochs / 9)
    for epoch in range(epochs):
        order = rows[epoch_order(len(rows), seed, epoch)]
        for k in range(per_epoch):
            chunk = order[k * batch : (k + 1) * batch].sort().values  # as they lie on disk
            training.step(*data.batch(chunk), learning_rate(epoch * per_epoch + k, steps, warmup, rate))
        yield training
