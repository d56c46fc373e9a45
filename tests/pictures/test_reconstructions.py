"""Pictures: what is painted where, and which files are drawn."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from leanmim.config import Pretrain, Show
from leanmim.data import Normalise, centre_crop
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.masking import Mask, take
from leanmim.mim import MIM
from leanmim.pictures import show
from leanmim.pictures.images import read_with, spread_out, stretched
from leanmim.pictures.reconstructions import make_columns, reconstruct
from leanmim.targets import TARGETS, patchify
from leanmim.weights import restore
from tests.data.stored import write
from tests.drawn import Drawn, names, run_of
from tests.helpers import noisy
from tests.runs import untrained

KINDS = ("mae", "raw mae", "grey", "wide", "simmim", "swin", "l1 tokens")


def variant(kind: str, tiny: Pretrain, tiny_simmim: Pretrain) -> Pretrain:
    return {
        "mae": tiny,
        "raw mae": replace(tiny, target="raw-pixels"),
        "grey": replace(tiny, channels=1),
        "wide": replace(tiny, input_size=(24, 40)),
        "simmim": tiny_simmim,
        "swin": replace(
            tiny_simmim, model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, mask_unit=32
        ),
        "l1 tokens": replace(tiny, masking="token", loss="l1"),
    }[kind]


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, tiny: Pretrain, tiny_simmim: Pretrain) -> Pretrain:
    return variant(request.param, tiny, tiny_simmim)


def scene(config: Pretrain) -> tuple[MIM, Tensor, Mask]:
    torch.manual_seed(0)
    model = build(config).eval()
    images = torch.randn(3, config.channels, *config.size)
    return model, images, model.draw_mask(images)


# reconstruct


def test_only_masked_patches_are_painted(config: Pretrain) -> None:
    model, images, mask = scene(config)
    painted, hidden = reconstruct(model, images, [mask])
    assert painted.shape == images.shape
    assert hidden.shape == (3, *config.size)
    assert not painted.requires_grad

    patch = model.encoder.stride
    whole = patchify(
        hidden[:, None].float(), patch
    )  # every patch is hidden wholly or not at all, and just the masked ones are
    assert torch.equal(take(whole, mask.masked), torch.ones(3, mask.masked.shape[1], patch**2))
    assert torch.equal(take(whole, mask.visible), torch.zeros(3, mask.visible.shape[1], patch**2))
    assert torch.equal(take(patchify(painted, patch), mask.visible), take(patchify(images, patch), mask.visible))
    differ = take(patchify(painted, patch), mask.masked) != take(patchify(images, patch), mask.masked)
    assert differ.any(-1).all()


def test_a_perfect_prediction_restores_the_original(config: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, mask = scene(config)

    def oracle(images: Tensor, masks: list[Mask], splits: object) -> Iterator[tuple[Tensor, Tensor]]:
        (mask,) = masks
        order = mask.masked.flip(1)  # the place of a prediction is what its index says
        yield order, take(model.target(images), order)

    monkeypatch.setattr(model, "predictions", oracle)
    painted, _ = reconstruct(model, images, [mask])
    torch.testing.assert_close(painted, images, rtol=0, atol=1e-4)


def test_what_is_painted_is_what_the_model_predicts(tiny: Pretrain) -> None:
    model, images, mask = scene(replace(tiny, target="raw-pixels"))
    ((ids, prediction),) = model.predictions(images, [mask])
    painted, _ = reconstruct(model, images, [mask])
    torch.testing.assert_close(take(patchify(painted, 8), ids), prediction)


def test_per_patch_predictions_take_the_true_patchs_mean_and_deviation(
    tiny: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, mask = scene(tiny)
    flat = torch.zeros(3, mask.masked.shape[1], model.target.width)
    monkeypatch.setattr(model, "predictions", lambda images, masks, splits: iter([(masks[0].masked, flat)]))
    painted, _ = reconstruct(model, images, [mask])
    mean = take(patchify(images, 8), mask.masked).mean(-1, keepdim=True)
    torch.testing.assert_close(take(patchify(painted, 8), mask.masked), mean.expand(-1, -1, model.target.width))


# The picture


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


@pytest.mark.usefixtures("whole_pictures")
def test_the_picture(config: Pretrain, drawn: Drawn) -> None:
    run = run_of(config)
    path = show(Show(runs=(str(run),), count=3))
    assert path == run / "reconstructions.png"
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        height, width = config.size
        assert picture.width == 819  # 6.3 inches at 130 dpi
        assert picture.height == pytest.approx((3 * 2.0 * height / width + 0.8) * 130, abs=2)
        assert np.asarray(picture.convert("L")).std() > 10

    (*_, note) = drawn.texts
    per_patch = config.target == "pixels"
    assert ("own mean" in note) == per_patch
    assert ("reconstruction *" in drawn.texts) == per_patch
    assert ("reconstruction" in drawn.texts) != per_patch
    assert note.startswith(f"{config.recipe}, {config.model}, step 7")
    for original, masked, painted in drawn.rows:
        assert original.shape == config.size + (() if config.channels == 1 else (3,))
        hidden = (masked == 0.5).reshape(*config.size, -1).all(-1)
        assert f"masked, {hidden.mean():.0%}" in drawn.texts
        assert np.array_equal(masked[~hidden], original[~hidden])
        assert np.array_equal(painted[~hidden], original[~hidden])
        assert not np.array_equal(painted[hidden], original[hidden])
        assert all(part.min() >= 0 and part.max() <= 1 for part in (original, painted))
    assert len(drawn.rows) == 3


def test_the_masks_depend_on_the_seed_alone(tiny: Pretrain) -> None:
    run = str(run_of(tiny))
    torch.manual_seed(1)
    first = show(Show(runs=(run,), count=2)).read_bytes()
    torch.manual_seed(2)
    assert show(Show(runs=(run,), count=2)).read_bytes() == first
    assert show(Show(runs=(run,), count=2, seed=1)).read_bytes() != first


def test_a_picture_elsewhere(tiny: Pretrain, tmp_path: Path) -> None:
    run = run_of(tiny)
    out = tmp_path / "new" / "picture.png"
    assert show(Show(runs=(str(run),), count=1, out=str(out))) == out
    assert out.is_file()
    assert not (run / "reconstructions.png").exists()
    with pytest.raises(UserError, match=r"cannot be written.*--out"):
        show(Show(runs=(str(run),), count=1, out=str(tmp_path / "new")))


# Which images


@pytest.mark.usefixtures("whole_pictures")
def test_a_file_and_a_folder(tiny: Pretrain, photos: Path, tmp_path: Path, drawn: Drawn) -> None:
    folder = tmp_path / "chosen"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(photos / "bee.jpg", folder / "deeper")
    shutil.copy(photos / "crab.jpg", folder / f"a very long name, {'longer and ' * 9}longer than there is room.jpg")
    show(Show(runs=(str(run_of(tiny)),), images=(str(photos / "cat.jpg"), str(folder))))
    assert names(drawn) == [
        "cat.jpg",
        "a very long name, longer and longer and long...nd longer and longer than there is room.jpg",
        "bee.jpg",
    ]


def test_the_runs_own_data_evenly_spread(tiny: Pretrain, photos: Path, drawn: Drawn) -> None:
    show(Show(runs=(str(run_of(tiny)),), count=4))
    assert names(drawn) == ["astronaut.jpg", "castle.jpg", "crab.jpg", "lemur.jpg"]
    assert names(drawn) == [path.name for path in sorted(photos.glob("*.jpg"))[::4]]


@pytest.mark.parametrize(("total", "count"), [(16, 8), (16, 5), (3, 8), (9, 9), (17, 4), (1, 1)])
def test_images_are_evenly_spread_and_the_others_follow(total: int, count: int) -> None:
    chosen = list(spread_out(total, count))
    assert sorted(chosen) == list(range(total))
    assert len({b - a for a, b in pairwise(chosen[:count])}) <= 1


def test_broken_files_of_the_runs_own_data_make_room_for_others(
    tiny: Pretrain, photos: Path, tmp_path: Path, drawn: Drawn
) -> None:
    """Also where every first choice is broken: a run must not fail at its very end."""
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    for path in sorted(data.glob("*.jpg"))[::4]:
        path.write_text("no picture")
    show(Show(runs=(str(run_of(replace(tiny, data=str(data)))),), count=4))
    assert names(drawn) == [path.name for path in sorted(data.glob("*.jpg"))[1::4]]


def test_grey_files_and_colour_models(tiny: Pretrain, tmp_path: Path, drawn: Drawn) -> None:
    file = tmp_path / "grey.png"
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8)).save(file)
    show(Show(runs=(str(run_of(tiny)),), images=(str(file),)))
    assert drawn.pictures[0].shape == (32, 32, 3)
    assert np.ptp(drawn.pictures[0], axis=2).max() == 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (("nowhere",), r"--images 'nowhere': there is no such file or folder"),
        (("nowhere.jpg",), r"--images 'nowhere.jpg': there is no such file or folder"),
        (("empty",), r"'empty' holds no files"),
        (("broken.jpg",), r"--images 'broken.jpg' cannot be read as an image"),
        (("spoilt",), r"no image of .*'spoilt'.* can be read; give others with --images"),
    ],
)
def test_images_that_are_not(
    images: tuple[str, ...], message: str, tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "spoilt").mkdir()
    for name in ("broken.jpg", "spoilt/broken.jpg"):
        (tmp_path / name).write_text("no picture")
    run = run_of(tiny)
    with pytest.raises(UserError, match=message):
        show(Show(runs=(str(run),), images=images))
    assert not (run / "reconstructions.png").exists()


def test_the_runs_own_data_is_gone(tiny: Pretrain) -> None:
    run = run_of(replace(tiny, data="gone"))
    with pytest.raises(UserError, match=r"the run's own data 'gone': .*give images with --images"):
        show(Show(runs=(str(run),)))


def test_no_rows(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match=r"--count 0 is out of range; it is at least 1"):
        show(Show(runs=(str(run_of(tiny)),), count=0))


class Rows:
    """A source that is no folder."""

    names = ("first", "second", "third")

    def __len__(self) -> int:
        return 3

    def where(self, index: int) -> str:
        return f"row {index}"

    def read(self, index: int) -> Image.Image:
        return Image.new("RGB", (40, 40), ["red", "lime", "blue"][index])


def test_a_run_on_a_source_of_a_third_party(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch, drawn: Drawn) -> None:
    monkeypatch.setattr("leanmim.data.source.SOURCES", [lambda data, channels: Rows() if data == "rows" else None])
    show(Show(runs=(str(run_of(replace(tiny, data="rows"))),), count=2))
    assert [text for text in drawn.texts if text in Rows.names] == ["first", "second"]
    assert [row[0].mean((0, 1)).round(2).tolist() for row in drawn.rows] == [[1, 0, 0], [0, 1, 0]]


class Negative:
    """A target that is neither pixels nor HOG."""

    def __init__(self, patch: int, channels: int) -> None:
        self.patch, self.cell, self.width = patch, 1, patch**2 * channels

    def __call__(self, images: Tensor) -> Tensor:
        return -patchify(images, self.patch)


def test_a_target_of_a_third_party_has_no_reconstruction(
    tiny: Pretrain, monkeypatch: pytest.MonkeyPatch, drawn: Drawn
) -> None:
    monkeypatch.setitem(TARGETS, "negative", lambda patch, channels, cell: Negative(patch, channels))
    run = run_of(replace(tiny, target="negative"))
    show(Show(runs=(str(run),), count=1))
    assert len(drawn.pictures) == 2
    assert drawn.texts[-1].endswith("--target negative has no reconstruction that can be drawn")


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_stored_values_are_drawn_between_their_percentiles(channels: int, shown: int) -> None:
    """Whatever their scale, and others as the originals are."""
    originals = noisy(2, channels, 32, 32)
    seen = stretched(originals)
    got, scaled = seen(originals), stretched(1000 * originals - 7)(1000 * originals - 7)
    assert got.shape == (2, shown, 32, 32) and got.min() == 0 and got.max() == 1
    torch.testing.assert_close(got, scaled, atol=1e-4, rtol=0)
    for picture, values in zip(got.flatten(0, 1), originals[:, :shown].flatten(0, 1), strict=True):
        assert 0.01 < (picture == 0).float().mean() < 0.02 and 0.01 < (picture == 1).float().mean() < 0.02
        assert torch.equal(picture == 0, values <= np.percentile(values, 1))
    assert seen(torch.zeros_like(originals)).unique().numel() == 2 * shown


@pytest.mark.usefixtures("whole_pictures")
def test_of_stored_values_the_picture_says_what_is_drawn(tiny: Pretrain, tmp_path: Path) -> None:
    config = replace(tiny, channels=5, data=str(tmp_path / "data"))
    write(tmp_path / "data", 2)
    trained, model, _ = restore(untrained(config))
    names, found = read_with(centre_crop(trained.size), Show(runs=(config.out,)), trained)
    values = torch.stack(found)
    assert names == ["0.npy", "1.npy"] and values.shape == (2, 5, 32, 32) and values.dtype == torch.float32
    normalise = Normalise([3e4] * 5, [2e4] * 5, torch.device("cpu"))
    images = normalise(values)
    masks = model.draw_masks(images)
    splits = model.draw_splits(masks)
    columns, remarks = make_columns(trained, model, normalise, images, masks, splits, [0])
    assert [column.pictures.shape[1] for column in columns] == [3, 3, 3]
    assert remarks[0] == "channels 1 to 3 of 5, stretched from the 1st to the 99th percentile of each image"
