"""Pictures become crops that depend on seed, epoch and index only, and normalised tensors."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from leanmim.data import IMAGENET, Crops, Folder, Labelled, Normalise, centre_crop, statistics
from leanmim.errors import UserError
from tests.data.pictures import CPU, Files, crops, noise, touch, write


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 24), (16, 40), (40, 16)])
def test_crops_are_bytes_of_the_size_asked_for(images: list[Path], size: tuple[int, int], channels: int) -> None:
    crop, bad = crops(images, size, channels)[0, 3]
    assert crop.dtype == torch.uint8 and crop.shape == (channels, *size)
    assert bad == []


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_crops_of_tiny_images_are_enlarged(tmp_path: Path, height: int, width: int) -> None:
    crop, bad = crops([write(tmp_path / "a.png", height, width)])[0, 0]
    assert crop.shape == (3, 24, 24) and not bad


@pytest.mark.parametrize(("decode", "rounding"), [("exact", 0), ("fast", 1)])
def test_a_crop_of_everything_is_the_resized_image(
    decode: Literal["fast", "exact"], rounding: int, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.png", 48, 48)
    crop, _ = Crops(Files([file]), (24, 24), (1.0, 1.0), (1.0, 1.0), 0.0, 0, decode=decode)[0, 0]
    want = np.asarray(Image.fromarray(noise(48, 48)).resize((24, 24), Image.Resampling.BICUBIC))
    assert np.abs(crop.permute(1, 2, 0).numpy().astype(int) - want).max() <= rounding


def test_flips_happen_as_often_as_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", 16, 16)

    def share(flip: float) -> float:
        data = Crops(Files([file]), (16, 16), (1.0, 1.0), (1.0, 1.0), flip, 0)
        want = torch.from_numpy(noise(16, 16)).permute(2, 0, 1)
        got = [data[epoch, 0][0] for epoch in range(60)]
        assert all(torch.equal(crop, want) or torch.equal(crop, want.flip(2)) for crop in got)
        return sum(torch.equal(crop, want.flip(2)) for crop in got) / 60

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0.3 < share(0.5) < 0.7


def test_crops_depend_on_seed_epoch_and_index_only(images: list[Path]) -> None:
    keys = [(epoch, index) for epoch in range(3) for index in range(len(images))]
    data = crops(images)
    torch.manual_seed(1)
    first = {key: data[key][0] for key in keys}
    torch.manual_seed(2)
    again = crops(images)
    second = {key: again[key][0] for key in reversed(keys)}
    assert all(torch.equal(first[key], second[key]) for key in keys)
    assert not any(torch.equal(first[0, i], first[1, i]) for i in range(len(images)))
    other = crops(images, seed=1)
    assert not any(torch.equal(first[0, i], other[0, i][0]) for i in range(len(images)))


def test_two_images_of_an_epoch_are_cropped_differently(tmp_path: Path) -> None:
    data = crops([write(tmp_path / f"{i}.png", seed=0) for i in range(4)])
    assert not any(torch.equal(data[0, 0][0], data[0, i][0]) for i in range(1, 4))


def test_crops_leave_the_random_numbers_of_the_process_alone(
    images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reseeded(seed: int) -> None:
        raise AssertionError("masks and drop path on the GPU would repeat")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    before = torch.get_rng_state()
    crops(images)[0, 0]
    Labelled(images[0].parent.parent, 3, v2.Compose([v2.RandomCrop(8), v2.PILToTensor()]))[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_replacement_is_the_next_image(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", write(tmp_path / "b.png", 24, 24, seed=5)]
    files[0].write_text("not a picture")
    crop, _ = Crops(Files(files), (24, 24), (1.0, 1.0), (1.0, 1.0), 0.0, 0)[0, 0]
    assert (crop.permute(1, 2, 0).numpy() == noise(24, 24, 5)).all()


# Normalise, statistics


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_is_the_formula_and_invert_undoes_it(channels: int) -> None:
    mean, std = IMAGENET[channels]
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, channels, 16, 16)
    normalise = Normalise(mean, std, CPU)
    y = normalise(x)
    want = (x.numpy().astype(np.float64) / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), want, atol=1e-6)
    np.testing.assert_allclose(normalise.invert(y).numpy(), x.numpy() / 255, atol=1e-6)
    assert torch.equal((normalise.invert(y) * 255).round().to(torch.uint8), x)
    extremes = normalise.invert(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, channels, 1, 2))
    assert extremes.flatten(0, 2).tolist() == [[0, 1]] * channels


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_weigh_every_image_alike(tmp_path: Path, channels: int) -> None:
    arrays = [noise(9, 7, 0), noise(30, 20, 1) // 2, noise(4, 50, 2) // 3]
    for i, array in enumerate(arrays):
        Image.fromarray(array if channels == 3 else array[..., 0]).save(tmp_path / f"{i}.png")
    touch(tmp_path, "bad.png")
    mean, std = statistics(Folder(tmp_path, channels), channels, seed=0)
    for c in range(channels):
        weights = np.concatenate([np.full(a[..., c].size, 1 / a[..., c].size / 3) for a in arrays])
        values = np.concatenate([a[..., c].ravel() / 255 for a in arrays])
        want = np.sum(weights * values)
        assert mean[c] == pytest.approx(want, abs=1e-6)
        assert std[c] == pytest.approx(np.sqrt(np.sum(weights * (values - want) ** 2)), abs=1e-6)


def test_statistics_of_a_sample_are_those_of_some_of_the_files(tmp_path: Path) -> None:
    levels = [0, 10, 30, 70]
    files = []
    for level in levels:
        files.append(tmp_path / f"{level}.png")
        Image.new("L", (4, 4), level).save(files[-1])
    sums = {(a + b) / 2 / 255: abs(a - b) / 2 / 255 for a in levels for b in levels if a < b}
    (mean,), (std,) = statistics(Files(files, 1), 1, seed=0, sample=2)
    (match,) = [key for key in sums if abs(key - mean) < 1e-9]
    assert std == pytest.approx(sums[match], abs=1e-6)
    assert statistics(Files(files, 1), 1, seed=0, sample=2) == ([mean], [std])


@pytest.mark.usefixtures("terminal")
def test_statistics_draw_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{i}.png") for i in range(3)]
    statistics(Files(files), 3, seed=0, sample=2)
    assert "mean and deviation of 2 images" in capsys.readouterr().err


def test_the_deviation_of_a_single_colour_is_not_zero(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5), (51, 0, 255)).save(tmp_path / "a.png")
    mean, std = statistics(Folder(tmp_path, 3), 3, seed=0)
    assert mean == pytest.approx([0.2, 0, 1]) and min(std) > 0


def test_statistics_of_nothing_readable_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(UserError, match=r"none of 2 sampled image files can be read.*jpg"):
        statistics(Folder(tmp_path, 3), 3, seed=0)


# centre_crop


@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (24, 24), (1, 1), (1, 40), (300, 301)])
@pytest.mark.parametrize("size", [(24, 24), (16, 40), (40, 16), (160, 128)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_centre_crops_have_the_size_asked_for(height: int, width: int, size: tuple[int, int], mode: str) -> None:
    crop = centre_crop(size)(Image.fromarray(noise(height, width)).convert(mode))
    assert crop.shape == (len(mode) if mode == "RGB" else 1, *size) and crop.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(256, 256), (256, 341), (256, 343), (345, 256), (333, 480), (640, 427), (99, 61)])
def test_at_224_the_crop_is_that_of_the_literature(photos: Path, shape: tuple[int, int]) -> None:
    with Image.open(photos / "bee.jpg") as file:
        image = file.resize(shape)
    reference = v2.Compose(
        [v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224), v2.PILToTensor()]
    )
    assert torch.equal(centre_crop((224, 224))(image), reference(image))


def test_the_share_that_is_kept_counts_from_the_centre() -> None:
    array = noise(20, 30)
    image = Image.fromarray(array)
    crop = centre_crop((10, 16), crop=0.8)  # 16 of 20 rows would be 10 of 12.5: the width decides, 16 of 24 of 30
    whole = centre_crop((20, 20))(image)  # a thumbnail keeps all of its short side
    assert crop(image).shape == (3, 10, 16)
    assert (whole.permute(1, 2, 0).numpy() == array[:, 5:25]).all()
    half = centre_crop((10, 15), crop=0.5)(image)
    assert (half.permute(1, 2, 0).numpy() == array[5:15, 8:23]).all() or (
        half.permute(1, 2, 0).numpy() == array[5:15, 7:22]
    ).all()
