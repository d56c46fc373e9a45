"""Efficient probing: against a plain version of the paper's formula, and its published size."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leanmim.evaluators import attentive
from leanmim.evaluators.attentive import AttentiveProbe, Tokens, Training, attentive_probe, split


def plain(probe: AttentiveProbe, x: Tensor) -> Tensor:
    """Each image and query by itself: values of every token, an attention for each part of them."""
    m, d = probe.queries.shape
    rows = []
    for tokens in x:
        values = tokens @ probe.value.weight.T  # n d
        parts = []
        for i in range(m):
            score = torch.stack([probe.queries[i] @ token / math.sqrt(d) for token in tokens])
            share = score.exp() / score.exp().sum()
            part = values[:, i * d // m : (i + 1) * d // m]
            parts.append((share[:, None] * part).sum(0))
        rows.append(torch.cat(parts))
    pooled = torch.stack(rows)
    normed = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-6).sqrt()
    return normed @ probe.classifier.weight.T + probe.classifier.bias


def training(width: int = 24, classes: int = 3, queries: int = 4) -> Training:
    return Training(width, classes, queries, 0, torch.device("cpu"))


def test_the_forward_pass_is_that_of_the_paper() -> None:
    probe = training().probe
    nn.init.normal_(probe.queries)
    x = torch.randn(6, 9, 24)
    torch.testing.assert_close(probe(x), plain(probe, x))
    torch.testing.assert_close(probe.attention(x).sum(2), torch.ones(6, 4))


def test_a_training_step_is_that_of_plain_pytorch() -> None:
    """LARS on all matrices, plain momentum on the bias; two steps, so that the momentum counts."""
    own, twin = training(), training().probe
    x, y = torch.randn(8, 5, 24), torch.arange(8) % 3
    velocity: dict[str, Tensor] = {}
    for _ in range(2):
        loss = own.step(x, y, lr=2.0)
        expected = nn.functional.cross_entropy(plain(twin, x), y)
        torch.testing.assert_close(loss, expected.detach())
        twin.zero_grad()
        expected.backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                assert p.grad is not None
                step = p.grad if p.ndim == 1 else p.grad * 0.001 * p.norm() / p.grad.norm()
                velocity[name] = step if name not in velocity else 0.9 * velocity[name] + step
                p -= 2.0 * velocity[name]
    for (name, p), q in zip(own.probe.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, atol=1e-5, rtol=1e-4)


def test_it_has_as_many_parameters_as_published() -> None:
    """For MAE's ViT-B on ImageNet, in the log of the paper's repository."""
    assert sum(p.numel() for p in AttentiveProbe(768, 1000).parameters()) == 1_383_400


@pytest.mark.parametrize(("width", "queries", "count"), [(768, 32, 32), (40, 32, 20), (24, 5, 4), (7, 32, 7)])
def test_the_queries_divide_the_width(width: int, queries: int, count: int) -> None:
    probe = AttentiveProbe(width, 2, queries)
    assert probe.queries.shape == (count, width)
    assert probe(torch.randn(2, 3, width)).shape == (2, 2)


def marked(count: int, seed: int, classes: int = 3) -> Tokens:
    """Noise; one token of each image, at any place, tells its class, in half precision as on disk."""
    draw = np.random.default_rng(seed)
    y = np.arange(count) % classes
    x = draw.normal(0, 0.3, (count, 10, 16))
    x[np.arange(count), draw.integers(0, 10, count), y] += 4
    return Tokens(x.astype(np.float16), torch.from_numpy(y))


def test_it_finds_the_token_that_tells_and_keeps_the_generator() -> None:
    state = torch.random.get_rng_state()
    found = attentive_probe(marked(192, 1), marked(60, 2), queries=4, epochs=20, warmup_epochs=2)
    assert found >= 0.95 and found.images == 60
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_seed_gives_the_same() -> None:
    hard = marked(96, 1), marked(200, 2)
    one, two = (attentive_probe(*hard, queries=4, epochs=2, warmup_epochs=0, seed=3) for _ in range(2))
    assert one == two


def test_the_rate_is_chosen_on_held_out_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never on the validation images, which here are all of another class than they say."""
    used: list[tuple[float, int]] = []
    fit = attentive.fit

    def watched(data: Tokens, rows: Tensor, rate: float, *rest: int) -> object:
        used.append((rate, len(rows)))
        return fit(data, rows, rate, *rest)

    monkeypatch.setattr(attentive, "fit", watched)
    val = marked(30, 2)
    wrong = Tokens(val.x, (val.y + 1) % 3)
    found = attentive_probe(marked(192, 1), wrong, 4, 15, 2, rates=(1e-6, 16.0))
    assert used == [(1e-6, 153), (16.0, 153), (16.0, 192)]
    assert found <= 0.05


def test_what_is_held_out_is_stratified() -> None:
    y = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)
    kept, held = split(y, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(80))
    assert torch.bincount(y[held]).tolist() == [10, 4, 2]
    assert torch.equal(split(y, 0)[1], held) and not torch.equal(split(y, 1)[1], held)


def test_nothing_is_held_out_of_a_class_of_one_image() -> None:
    """The first rate then it is."""
    kept, held = split(torch.tensor([0, 0, 0, 0, 1]), 0)
    assert (len(kept), len(held)) == (5, 0)
    few = Tokens(marked(40, 1).x[:5], torch.tensor([0, 0, 1, 1, 2]))
    assert 0 <= attentive_probe(few, few, epochs=2, warmup_epochs=1) <= 1
