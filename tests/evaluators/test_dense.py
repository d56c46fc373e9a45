"""Segmentation by frozen patch features: scikit-learn's measures, a brute force, drawn images, what does not count."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from leanmim.config import Evaluate, Pretrain
from leanmim.errors import UserError
from leanmim.evaluators import dense
from leanmim.evaluators.accuracy import Resampled
from leanmim.evaluators.dense import Dense, Measure, draw, grid_of, iou_of, judge, largest, neighbours, tally
from leanmim.evaluators.evaluate import evaluate
from leanmim.evaluators.features import Features, subjects
from leanmim.run import Run
from tests.evaluators.samples import forks, swin
from tests.masked import masked_squares, write_mask
from tests.runs import untrained

MEASURE = Measure((0, 1), "knn", "kNN", {}, 0, lambda x: x, np.arange(2))
PATCHES = ["kNN, k = 1", "kNN, k = 5", "linear, layer 1", "linear, layer 2", "linear, layer 3", "linear"]


@pytest.fixture
def own(tiny: Pretrain, tmp_path: Path) -> Evaluate:
    """Squares of 8 px in the input, one for each patch of an untrained ViT."""
    masks = masked_squares(tmp_path / "squares")
    return Evaluate(run=str(untrained(tiny)), masks=str(masks), device="cpu", workers=0, k=(1, 5))


def found(config: Evaluate) -> dict[tuple[str, str], Resampled]:
    values = {(result.name, result.measure): result.accuracy for result in evaluate(config).results}
    assert all(isinstance(value, Resampled) for value in values.values())
    return values  # type: ignore[return-value]


def labels(seed: int, classes: int, count: int = 5) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks of different sizes with void, and what was found in their place."""
    random = np.random.default_rng(seed)
    truth = [random.integers(0, classes, (20 + i, 30)) for i in range(count)]
    guess = [np.where(random.random(mask.shape) < 0.5, mask, random.integers(0, classes, mask.shape)) for mask in truth]
    for mask in truth:
        mask[random.random(mask.shape) < 0.2] = 255
    return truth, guess


def test_mean_iou_and_pixel_accuracy_are_those_of_scikit_learn() -> None:
    truth, guess = labels(0, 5)
    for mask in truth:
        mask[mask == 3] = 255  # found, but nowhere there
    counts = np.stack(
        [np.pad(part, ((0, 0), (0, 256 - part.shape[1]))) for part in map(tally, truth, guess, [[255]] * 5)]
    )
    result = judge(MEASURE, counts, np.arange(256), 0)
    one, two = (np.concatenate([part.ravel() for part in parts]) for parts in (truth, guess))
    one, two = one[one != 255], two[one != 255]
    ious = jaccard_score(one, two, labels=[0, 1, 2, 4], average=None)
    assert list(result.ious) == ["0", "1", "2", "4"]
    assert list(result.ious.values()) == pytest.approx(list(ious))
    assert result.miou == pytest.approx(jaccard_score(one, two, labels=[0, 1, 2, 4], average="macro"))
    assert result.accuracy == pytest.approx(accuracy_score(one, two))
    matrix = confusion_matrix(one, two, labels=range(256))
    assert np.array_equal(counts.sum(0), [matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def test_the_interval_is_that_of_images_drawn_one_by_one() -> None:
    truth, guess = labels(1, 3, 30)
    counts = np.stack([tally(*pair, [255]) for pair in zip(truth, guess, strict=True)])
    result = judge(MEASURE, counts, np.arange(3), 0)
    random = np.random.default_rng(9)
    drawn = [np.nanmean(iou_of(counts[random.integers(0, 30, 30)].sum(0))) for _ in range(4000)]
    assert result.miou.interval == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.001)
    assert result.miou.interval[0] < result.miou < result.miou.interval[1] and result.miou.images == 30
    assert judge(MEASURE, counts, np.arange(3), 0).miou.interval == result.miou.interval
    assert judge(MEASURE, counts, np.arange(3), 1).miou.interval != result.miou.interval
    assert "(95 % interval" in str(result.miou)


def test_a_class_that_a_draw_lacks_does_not_count_in_it() -> None:
    counts = np.array([[[8, 0], [8, 0], [8, 0]], [[0, 2], [0, 2], [0, 2]]])
    result = judge(MEASURE, counts, np.array([0, 7]), 0)
    assert (result.miou, result.miou.interval, result.ious) == (1.0, (1.0, 1.0), {"0": 1.0, "7": 1.0})


def test_votes_are_those_of_a_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a few patches at once; of other patches other ones."""
    random = np.random.default_rng(0)
    bank, x, y = random.normal(size=(50, 8)), random.normal(size=(2, 23, 8)), random.integers(0, 4, 50)
    ks = (3, 7, 50)
    expected = np.zeros((2, len(ks), 23, 4))
    unit, own = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (bank, x))
    for batch, which, row in np.ndindex(2, len(ks), 23):
        similarity = unit @ own[batch, row]
        near = np.argsort(-similarity)[: ks[which]]
        weights = np.exp(similarity[near] / 0.07)
        for place, weight in zip(near, weights / weights.sum(), strict=True):
            expected[batch, which, row, y[place]] += weight
    features = Features(torch.tensor(unit, dtype=torch.float32), torch.tensor(y))
    for at_once in (2**20, 100):
        monkeypatch.setattr(dense, "AT_ONCE", at_once)
        functions = neighbours(features, 4, ks, 0.07)
        for patches, wanted in zip(torch.tensor(x, dtype=torch.float32), expected, strict=True):
            votes = torch.stack([function(patches) for function in functions])
            assert votes.numpy() == pytest.approx(wanted, abs=1e-5)


def test_the_largest_upsampled_score(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(scores[None], (31, 45), mode="bilinear")[0].argmax(0).numpy()
    for at_once in (2**20, 31 * 45 * 2, 1):
        monkeypatch.setattr(dense, "AT_ONCE", at_once)
        assert np.array_equal(largest(scores, (31, 45)), whole)


def test_squares_of_a_colour_each_are_found(own: Evaluate) -> None:
    values = found(replace(own, baselines=("random", "pixels")))
    for name in ("pretrained", "random", "pixels"):
        patches = [title for title in PATCHES if name != "pixels" or "layer" not in title]
        expected = [f"{what}, {title}" for what in ("mIoU", "pixels") for title in patches]
        assert sorted(expected) == sorted(title for own_name, title in values if own_name == name)
    # bilinear upsampling blurs the borders of 8 px wide squares
    assert values["pixels", "mIoU, kNN, k = 1"] > 0.9
    assert values["pretrained", "mIoU, linear"] > 0.8


def test_random_masks_are_found_by_chance(tiny: Pretrain, own: Evaluate, tmp_path: Path) -> None:
    """Of three classes, all as frequent, a third of the pixels: IoU is a third of a third by five ninths of all."""
    masks = masked_squares(tmp_path / "random", (40, 40), random=True)
    values = found(replace(own, masks=str(masks), k=(20,), layers=(0,), baselines=("pixels",)))
    for name in ("pretrained", "pixels"):
        assert values[name, "pixels, kNN, k = 20"] == pytest.approx(1 / 3, abs=0.06)
        assert values[name, "mIoU, linear"] == pytest.approx(1 / 5, abs=0.06)


def test_void_does_not_count(own: Evaluate) -> None:
    """Half of each mask is another class that no image shows; as void it changes nothing but what is judged."""
    own = replace(own, k=(1,), layers=(0,))
    for file in Path(str(own.masks)).glob("*/masks/*.png"):
        mask = np.full((64, 64), 7)
        mask[:, :32] = np.kron(np.random.default_rng(0).integers(0, 2, (4, 2)), np.ones((16, 16), int))
        write_mask(file, mask)
    lines = evaluations(replace(own, void=(7, 255)))
    assert list(lines["mIoU linear"]["ious"]) == ["0", "1"] and lines["mIoU linear"]["options"]["patches"] == 12 * 8
    assert list(evaluations(own)["mIoU linear"]["ious"]) == ["0", "1", "7"]
    assert evaluations(own)["mIoU linear"]["options"]["patches"] == 12 * 16
    with pytest.raises(UserError, match=r"hold no class where patches were drawn; .*--void"):
        evaluate(replace(own, void=(0, 1, 7)))
    with pytest.raises(UserError, match=r"hold only class 7 where patches were drawn"):
        evaluate(replace(own, void=(0, 1)))
    for file in Path(str(own.masks)).glob("val/masks/*.png"):
        write_mask(file, np.full((64, 64), 255))
    with pytest.raises(UserError, match=r"no pixel of the masks of '.*val/masks' has a class"):
        evaluate(own)


def evaluations(config: Evaluate) -> dict[str, dict]:
    """The last line of each measure."""
    evaluate(config)
    lines = map(json.loads, Run(Path(config.run)).evaluations.read_text().splitlines())
    return {line["what"]: line for line in lines}


def test_every_result_is_written_down_and_said(own: Evaluate) -> None:
    text = str(shown := evaluate(replace(own, patches=100, seed=3, layers=(2,), void=(255, 9))))
    assert "12 training and 6 validation images, 32 x 32 px; 100 of the 192 training patches, drawn with seed 3" in text
    assert (
        "95 % of 1,000 bootstrap draws." in text and "Wilson" not in text and max(map(len, text.splitlines()[1:])) <= 80
    )
    lines = [json.loads(line) for line in Run(Path(own.run)).evaluations.read_text().splitlines()]
    kinds = ["knn", "knn", "linear layer 2", "linear"]
    assert [line["what"] for line in lines] == [f"{what} {k}" for what in ("mIoU", "pixel accuracy") for k in kinds]
    shared = dict(depth=None, input_size=[32, 32], crop=None, void=[255, 9], seed=3, patches=100)
    assert lines[1]["options"] == {**shared, "k": 5, "temperature": 0.07}
    assert lines[3]["options"] == {**shared, "c": 1.0}
    for line, result in zip(lines, shown.results, strict=True):
        assert (line["value"], line["interval"]) == (result.accuracy, list(result.accuracy.interval))
        assert (line["name"], line["images"], line["data"]) == ("pretrained", 6, own.masks)
    assert lines[3]["value"] == pytest.approx(np.mean(list(lines[3]["ious"].values())))


def test_with_a_labelled_folder_both_are_measured(own: Evaluate, tiles: Path) -> None:
    both = replace(own, data=str(tiles), k=(1,), layers=(0,), shots=(1,), draws=2, attentive=False)
    assert [result.measure for result in evaluate(both).results] == [
        "kNN, k = 1", "linear", "few-shot, 1 a class", "mIoU, kNN, k = 1", "mIoU, linear", "pixels, kNN, k = 1", "pixels, linear",
    ]  # fmt: skip
    with pytest.raises(UserError, match="give --data, a labelled folder, or --masks"):
        evaluate(replace(own, masks=None))


def test_patches_are_drawn_by_the_seed() -> None:
    assert np.array_equal(draw(50, 50, 0), np.arange(50))
    assert np.array_equal(draw(1000, 50, 0), draw(1000, 50, 0))
    assert len(set(draw(1000, 50, 0))) == 50 and not np.array_equal(draw(1000, 50, 0), draw(1000, 50, 1))


def test_another_size_another_depth_grey(own: Evaluate, tiny: Pretrain) -> None:
    own = replace(own, k=(1,), layers=(0,))
    assert found(replace(own, input_size=(64, 48)))["pretrained", "pixels, linear"] > 0.7
    with_depth = replace(
        own, run="scratch", model=tiny.model, model_kwargs=tiny.model_kwargs, input_size=(32,), depth=2
    )
    assert found(with_depth)["pretrained", "mIoU, linear"] > 0.8
    grey = untrained(replace(tiny, channels=1, out=f"{tiny.out}-grey"))
    assert found(replace(own, run=str(grey)))["pretrained", "pixels, linear"] > 0.4


def test_stages_of_a_swin_have_grids_of_their_own(tiny_simmim: Pretrain, tmp_path: Path) -> None:
    masks = masked_squares(tmp_path / "squares", (24, 6), squares=2, side=32)
    config = Evaluate(
        run=str(untrained(swin(tiny_simmim))), masks=str(masks), device="cpu", workers=0, k=(1,), layers=(1, 3),
        baselines=("pixels",), input_size=(64,), patches=300,
    )  # fmt: skip
    (subject, _) = subjects(config, dense.masked_sets)
    assert Dense(config, subject, (1, 3)).grids == [(16, 16), (4, 4), (2, 2)]
    values = found(config)
    assert values["pretrained", "pixels, linear, layer 1"] > 0.9
    assert values["pretrained", "mIoU, linear"] > 0.6
    assert values["pixels", "mIoU, linear"] > 0.6


@pytest.mark.parametrize(
    ("n", "size", "grid"),
    [
        (196, (224, 224), (14, 14)),
        (28, (100, 200), (4, 7)),
        (48, (96, 128), (6, 8)),
        (7, (32, 224), (1, 7)),
        (1, (9, 9), (1, 1)),
    ],
)
def test_the_grid_of_so_many_patches(n: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert grid_of(n, size) == grid


def test_unreadable_files_are_left_out_and_counted(own: Evaluate, capfd: pytest.CaptureFixture[str]) -> None:
    masks = Path(str(own.masks))
    (masks / "train" / "images" / "0.png").write_bytes(b"none")
    (masks / "val" / "masks" / "0.png").write_bytes(b"none")
    lines = evaluations(replace(own, k=(1,), layers=(0,)))
    assert lines["mIoU knn"]["images"] == 5 and lines["mIoU knn"]["left_out"] == 1
    assert lines["mIoU knn"]["options"]["patches"] == 11 * 16
    assert "1 of 12 images of" in capfd.readouterr().err
    for file in (masks / "val" / "images").iterdir():
        file.write_bytes(b"none")
    with pytest.raises(UserError, match="none of the 6 image files can be read"):
        evaluate(own)


@forks
def test_colours_are_refused_by_readers_too(own: Evaluate) -> None:
    for file in Path(str(own.masks)).glob("train/masks/*.png"):
        file.write_bytes((file.parent.parent / "images" / file.name).read_bytes())
    with pytest.raises(
        UserError, match=r"^[^ ]*train/masks/0\.png is a picture in colours; .*a number for each colour$"
    ):
        evaluate(replace(own, workers=1))
