"""The choices of the probes: MAE's crop and pooling, the strength of the penalty, and what has no patches."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import v2

from leanmim.config import Knn, Pretrain, Probe
from leanmim.errors import UserError
from leanmim.evaluators.features import Features, subjects
from leanmim.evaluators.probe import STRENGTHS, LoopFreeCrop, fast_probe, probe
from tests.evaluators.samples import clusters, swin
from tests.runs import untrained

HEIGHT, WIDTH = 375, 500  # ImageNet's typical photo


def shares(seed: int, count: int = 4000) -> Iterator[tuple[float, float]]:
    """The share of the photo in our crop, and in torchvision's."""
    crop, image = LoopFreeCrop((224, 224)), torch.zeros(3, HEIGHT, WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(count):
            _, _, h, w = crop.box(HEIGHT, WIDTH)
            _, _, theirs_h, theirs_w = v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(224), [image]).values()
            yield h * w / HEIGHT / WIDTH, theirs_h * theirs_w / HEIGHT / WIDTH


def test_the_loop_free_crop_is_as_large_as_published_and_torchvisions_is_smaller() -> None:
    ours, theirs = np.mean(list(shares(0)), axis=0)
    assert ours == pytest.approx(0.52, abs=0.012)
    assert theirs == pytest.approx(0.44, abs=0.012)


def test_the_loop_free_crop_is_one_draw_of_area_and_ratio_cut_to_the_image() -> None:
    """Areas are uniform, and wherever the image does not cut them the ratio is between 3/4 and 4/3."""
    crop, boxes = LoopFreeCrop((8, 8)), []
    for seed in range(1500):
        torch.manual_seed(seed)
        boxes.append(crop.box(300, 300))
    top, left, height, width = np.array(boxes).T
    assert (top >= 0).all() and (top + height <= 300).all() and (left + width <= 300).all()
    inside = (height < 300) & (width < 300)
    ratio = width[inside] / height[inside]
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.36
    areas = height * width / 300**2
    assert areas.min() == pytest.approx(0.08, abs=0.01)
    assert np.mean(areas < 0.54) == pytest.approx(0.5, abs=0.05)  # cutting moves none across the middle of 0.08 to 1
    assert crop(Image.new("RGB", (5, 900))).size == (8, 8)


@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_auto_is_the_best_strength_of_scikit_learns_cross_validation(spread: float) -> None:
    train, val = clusters(60, 5, spread, 1), clusters(100, 5, spread, 2)
    cut = StratifiedKFold(5, shuffle=True, random_state=0)
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)) for c in STRENGTHS]
    means = [cross_val_score(model, train.x.numpy(), train.y.numpy(), cv=cut).mean() for model in models]
    best = STRENGTHS[int(np.argmax(means))]
    assert fast_probe(train, val, "auto") == fast_probe(train, val, best)


def test_auto_of_a_class_of_one_image_is_the_default() -> None:
    train, val = clusters(60, 5, 1.5, 1), clusters(100, 5, 1.5, 2)
    few = Features(train.x[:11], train.y[:11].clone().clamp(max=3))
    few.y[10] = 4
    assert fast_probe(few, val, "auto") == fast_probe(few, val)


def pool_of(config: Knn | Probe) -> str:
    (subject,) = subjects(config)
    return subject.pool


def test_auto_pools_the_class_token_for_lars_only(tiny: Pretrain, tiny_simmim: Pretrain, tiles: Path) -> None:
    here = dict(data=str(tiles), device="cpu", workers=0)
    vit = str(untrained(tiny))
    assert pool_of(Probe(run=vit, solver="lars", **here)) == "token"  # type: ignore[arg-type]
    assert pool_of(Probe(run=vit, solver="lars", pool="avg", **here)) == "avg"  # type: ignore[arg-type]
    assert pool_of(Probe(run=vit, **here)) == pool_of(Knn(run=vit, **here)) == "avg"  # type: ignore[arg-type]
    other = str(untrained(replace(swin(tiny_simmim), out=f"{tiny.out}-swin")))
    assert pool_of(Probe(run=other, solver="lars", **here)) == "avg"  # type: ignore[arg-type]


def test_pixels_have_no_patch_tokens(options: dict[str, object]) -> None:
    own = Probe(**options, solver="attentive", epochs=1, baselines=("pixels",))  # type: ignore[arg-type]
    found = probe(own)
    assert next(found)[0] == "pretrained"
    with pytest.raises(UserError, match=r"--solver attentive needs patch tokens, which pixels have not"):
        next(found)


@pytest.mark.parametrize(
    ("blr", "weights", "bias"), [("auto", 6.4, 0.1 * 64 / 256), (0.8, 0.8 * 64 / 256, 0.8 * 64 / 256)]
)
def test_lars_rates(
    options: dict[str, object], capsys: pytest.CaptureFixture[str], blr: float | str, weights: float, bias: float
) -> None:
    """Given, that of the batch of 64; by itself MAE's own for what LARS adapts, and that of the batch for the bias."""
    list(probe(Probe(**options, solver="lars", epochs=1, blr=blr)))  # type: ignore[arg-type]
    assert f"lr {weights:g}, of the bias {bias:g};" in capsys.readouterr().err


def test_lars_of_what_is_no_run_leaves_nothing(tiles: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    kind = dict(
        model="vit_tiny_patch16_224", model_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    )
    own = Probe(
        run="scratch", data=str(tiles), **kind, input_size=(32,), device="cpu", workers=0, solver="lars", epochs=1
    )  # type: ignore[arg-type]
    ((name, accuracy),) = probe(own)
    assert name == "pretrained" and 0 <= accuracy <= 1
    assert sorted(tmp_path.rglob("*")) == before
