"""One step of fine-tuning against a plain PyTorch step written here, the schedule against its formula."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from leanmim.classifier.model import Made
from leanmim.classifier.recipes import MAE
from leanmim.classifier.tuning import Tuning
from leanmim.config import Finetune
from leanmim.config.base import Model

CPU = torch.device("cpu")
KINDS = {
    "vit": ("vit_tiny_patch16_224", dict(patch_size=8, embed_dim=32, depth=3, num_heads=2, global_pool="avg")),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=1),
    ),
}


def classifier(kind: str = "vit", drop_path: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    name, arguments = KINDS[kind]
    return timm.create_model(name, num_classes=3, img_size=32, drop_path_rate=drop_path, **arguments)


def config(**changes: object) -> Finetune:
    return replace(
        MAE,
        epochs=10,
        batch_size=4,
        effective_batch=8,
        accum=2,
        blr=0.05,
        warmup_epochs=2.0,
        ema=0.9,
        device="cpu",
        **changes,
    )


def tuning(model: nn.Module, own: Finetune, per_epoch: int = 5, weights: Tensor | None = None) -> Tuning:
    return Tuning(own, Made(model, Model(), []), per_epoch, weights, CPU)


def mixed(count: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3, label_smoothing=0.1)
    images = [torch.randn(4, 3, 32, 32, generator=draw) for _ in range(count)]
    return [mixup(x, torch.arange(4) % 3) for x in images]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_steps_are_those_of_plain_pytorch(kind: str, clip: float) -> None:
    """An AdamW of its own for each parameter, gradients of a whole batch, timm's loss; three steps."""
    model = classifier(kind)
    own = config(layer_decay=0.5, clip_grad=clip)
    other, ours = deepcopy(model), tuning(model, own)
    depth = {"vit": 3, "swin": 5}[kind]
    starts = {"vit": 0, "swin": None}

    def layer(name: str) -> int:
        parts = name.split(".")
        if parts[0] in ("norm", "fc_norm", "head"):
            return depth + 1
        if kind == "vit":
            return int(parts[1]) + 1 if parts[0] == "blocks" else starts["vit"] or 0
        if parts[0] != "layers":
            return 0
        first = (0, 1, 2, 4)[int(parts[1])]
        return first if parts[2] == "downsample" else first + int(parts[3]) + 1

    exempt = other.no_weight_decay()
    single = {
        name: torch.optim.AdamW(
            [p], lr=0.0, betas=(0.9, 0.999), weight_decay=0.0 if p.ndim == 1 or name in exempt else 0.05
        )
        for name, p in other.named_parameters()
    }
    average = deepcopy(other)
    for step in range(3):
        batches = mixed(2)
        lr = ours.set_learning_rate(step)
        assert lr == pytest.approx(0.05 * 8 / 256 * step / 5 / 2)
        loss = ours.step(step, iter([(x.clone(), y.clone()) for x, y in batches]))
        expected = SoftTargetCrossEntropy()(
            other(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        expected.backward()
        if clip:
            nn.utils.clip_grad_norm_(other.parameters(), clip)
        for name, optimizer in single.items():
            optimizer.param_groups[0]["lr"] = lr * 0.5 ** (depth + 1 - layer(name))
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.9, 1 - (step + 1) ** (-2 / 3)) if step else 0.0  # timm: from the second step on
        with torch.no_grad():
            for mean, value in zip(average.parameters(), other.parameters(), strict=True):
                mean.lerp_(value, 1 - max(0.0, decay))
    for (name, value), mine in zip(other.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(mine, value, atol=1e-6, rtol=1e-5, msg=name)
    assert ours.average is not None
    for mean, mine in zip(average.parameters(), ours.average.module.parameters(), strict=True):
        torch.testing.assert_close(mine, mean, atol=1e-6, rtol=1e-5)


def test_the_learning_rate_is_that_of_the_formula() -> None:
    own = config(min_lr=1e-5, layer_decay=0.65)
    ours = tuning(classifier(), own)
    peak = 0.05 * 8 / 256
    for step in range(50):
        epoch = step / 5
        cosine = 1e-5 + (peak - 1e-5) * 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 8))
        assert ours.set_learning_rate(step) == pytest.approx(peak * epoch / 2 if epoch < 2 else cosine)
    for group in ours.optimizer.param_groups:
        assert group["lr"] == pytest.approx(ours.set_learning_rate(49) * group["lr_scale"])


def test_class_weights_weigh_the_loss_of_a_class() -> None:
    model, weights = classifier(), torch.tensor([2.0, 1.0, 0.5])
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 2])
    soft = nn.functional.one_hot(labels, 3).float()
    (found,) = tuning(model, config(), weights=weights).losses((images, soft))
    rows = nn.functional.cross_entropy(model(images), labels, reduction="none")
    torch.testing.assert_close(found, (rows * weights[labels]).mean())


def test_drop_path_depends_on_seed_and_step_only() -> None:
    results = []
    for noise in (1, 2):
        ours = tuning(classifier(drop_path=0.5), config())
        torch.manual_seed(noise)
        results.append([ours.step(step, iter(mixed_once())).item() for step in range(2)])
    assert results[0] == results[1]


def mixed_once() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 3, 32, 32, generator=draw), torch.eye(3)[torch.arange(4) % 3]) for _ in range(2)]


def test_the_average_is_evaluated_and_the_model_goes_on_in_training_mode() -> None:
    ours = tuning(classifier(), config())
    ours.set_learning_rate(9)
    for step in range(3):
        ours.step(step, iter(mixed_once()))
    images = torch.randn(2, 3, 32, 32)
    assert ours.average is not None
    with ours.evaluated() as logits:
        found = logits(images)
    assert ours.model.training
    torch.testing.assert_close(found, ours.average.module(images).detach())
    assert not torch.equal(found, ours.model.eval()(images).detach())


def test_a_restored_tuning_goes_on_alike() -> None:
    one, other = tuning(classifier(), config()), tuning(classifier(seed=1), config())
    one.set_learning_rate(9)
    one.step(0, iter(mixed_once()))
    state = deepcopy({"step": 1, **one.state()})
    other.restore(state)
    for ours in (one, other):
        ours.set_learning_rate(10)
        ours.step(1, iter(mixed_once()))
    for mine, theirs in ((one.model, other.model), (one.average, other.average)):
        assert mine is not None and theirs is not None
        assert all(
            torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
