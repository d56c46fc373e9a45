import io
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from leanmim.config import Pretrain
from leanmim.config.base import Stored
from leanmim.data import Bad, Crops, Folder, Normalise, batches, centre_crop, open_source, read_image
from leanmim.data import stored as module
from leanmim.data.source import read
from tests.data.pictures import CPU, noise
from tests.data.stored import WRITERS, bands, values, write


def whole(folder: Path, channels: int, size: tuple[int, int] = (20, 30), decode: str = "fast") -> Crops:
    """Crops that are the whole image."""
    ratio = size[1] / size[0]
    return Crops(open_source(str(folder), Stored(channels)), size, (1.0, 1.0), (ratio, ratio), 0.0, 0, decode=decode)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("form", WRITERS)
def test_values_are_those_of_the_file(form: str, kind: str, tmp_path: Path) -> None:
    if form == "imagej" and kind in ("int16", "float64"):
        pytest.skip("ImageJ has no such numbers")
    suffix, write_to = WRITERS[form]
    array = values(kind=kind)
    write_to(tmp_path / f"a{suffix}", array)
    got = read_image(tmp_path / f"a{suffix}", Stored(5))
    assert isinstance(got, np.ndarray) and got.dtype == kind
    np.testing.assert_array_equal(got, array.transpose(1, 2, 0))


@pytest.mark.parametrize("form", ["bands", "pages", "array, channels first"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_one_to_sixteen_channels(form: str, channels: int, tmp_path: Path) -> None:
    suffix, write_to = WRITERS[form]
    write_to(tmp_path / f"a{suffix}", values(channels))
    got = np.asarray(read_image(tmp_path / f"a{suffix}", Stored(channels)))
    np.testing.assert_array_equal(got, values(channels).transpose(1, 2, 0))


def test_what_pillow_reads_as_values(tmp_path: Path) -> None:
    deep = values(1)[0]
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "deep.png", Stored(1)))[..., 0], deep)
    Image.fromarray(noise(20, 30)).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(read_image(tmp_path / "colour.png", Stored(3)), noise(20, 30))


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_batches_hold_the_files_values_normalised(decode: str, tmp_path: Path) -> None:
    """Exact in float32 where the crop is the whole image."""
    arrays = write(tmp_path, 3)
    crops = whole(tmp_path, 5, decode=decode)
    images = torch.stack([crops[0, i][0] for i in range(3)])
    assert images.dtype == torch.float32
    mean, std = [3e4, 3.1e4, 3.2e4, 3.3e4, 3.4e4], [1.9e4, 1.8e4, 1.7e4, 1.6e4, 1.5e4]
    got = Normalise(mean, std, CPU)(images).numpy()
    column = (slice(None), None, None)
    want = (np.stack(arrays).astype(np.float32) - np.float32(mean)[column]) / np.float32(std)[column]
    np.testing.assert_array_equal(got, want)


def test_a_run_of_batches_is_exact_and_flips(tiny: Pretrain, tmp_path: Path) -> None:
    arrays = write(tmp_path, 4, height=32, width=32)
    config = replace(
        tiny, data=str(tmp_path), channels=5, crop_scale=(1, 1), crop_ratio=(1, 1), flip=1.0, workers=1, batch_size=4
    )
    (images, bad), *_ = batches(config, open_source(config.data, config.read_as), 0, 1)
    assert not bad
    found = {image.numpy().tobytes() for image in images}
    assert found == {array[..., ::-1].astype(np.float32).tobytes() for array in arrays}


def test_crops_are_resized_with_antialiasing(tmp_path: Path) -> None:
    """A halved image is close to its mean over squares of two, of each channel on its own."""
    ramp = np.add.outer(np.arange(40), np.arange(60))[None] * np.array([1, 100, 1000])[:, None, None]
    np.save(tmp_path / "a.npy", ramp.astype(np.float32))
    want = ramp.reshape(3, 20, 2, 30, 2).mean((2, 4))
    inner = (slice(None), slice(2, -2), slice(2, -2))
    for got in (whole(tmp_path, 3)[0, 0][0], centre_crop((20, 30), 1.0)(read_image(tmp_path / "a.npy", Stored(3)))):
        np.testing.assert_allclose(got.numpy()[inner], want[inner], rtol=1e-3, atol=0.5)


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    array = values(2, 40, 64).transpose(1, 2, 0)
    got = centre_crop((16, 16), 0.4)(array)
    np.testing.assert_array_equal(got.numpy(), array[12:28, 24:40].transpose(2, 0, 1).astype(np.float32))


def test_crops_of_few_channels_are_those_of_the_same_picture(tmp_path: Path) -> None:
    """The same boxes as of a PNG, within the rounding of a resize in bytes."""
    (tmp_path / "png").mkdir()
    Image.fromarray(noise(40, 56)).save(tmp_path / "png" / "a.png")
    options = ((24, 24), (0.2, 1.0), (0.75, 4 / 3), 0.5, 3)
    ours, theirs = (Crops(Folder(tmp_path / "png", kind), *options) for kind in (Stored(3), 3))
    for epoch in range(5):
        rounded = ours[epoch, 0][0].round().clamp(0, 255)
        assert (rounded - theirs[epoch, 0][0].float()).abs().mean() < 0.5


def test_what_is_not_finite_is_0(tmp_path: Path) -> None:
    array = np.array([[np.nan, np.inf, 1e300], [-np.inf, 2, 3]])
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(whole(tmp_path, 1, (2, 3))[0, 0][0][0], [[0, 0, 0], [0, 2, 3]])


def deep_colours(path: Path) -> None:
    """A PNG of 16 bits and three channels, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(12) for _ in range(2))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "channels", "make", "reason"),
    [
        ("a.npy", 4, lambda p: np.save(p, values(5)), "of 4 channels"),
        ("a.npy", 5, lambda p: np.save(p, values(5, 20, 5)), "first or last"),
        ("a.npy", 5, lambda p: np.save(p, values(5)[0]), "has 1 channels, not 5"),
        ("a.npy", 5, lambda p: np.save(p, values(5)[None]), "no image of 5 channels"),
        ("a.npy", 1, lambda p: np.save(p, np.zeros((4, 4), complex)), "complex128, no real numbers"),
        ("a.npy", 1, lambda p: np.save(p, np.array([["a", "b"]])), "no real numbers"),
        ("a.npy", 1, lambda p: np.save(p, np.array([[{}]]), allow_pickle=True), "allow_pickle"),
        ("a.npy", 1, lambda p: np.save(p, np.zeros((0, 4))), "no pixels"),
        ("a.npy", 1, lambda p: p.write_bytes(b"no array"), "cannot identify"),
        ("a.tif", 4, lambda p: bands(p, values(5)), "has 5 channels, not 4"),
        ("a.tif", 6, lambda p: tifffile.imwrite(p, values(6).reshape(2, 3, 20, 30), imagej=True), "not height, width and one of channels"),
        ("a.tif", 5, lambda p: p.write_bytes(b"II*\0 no image"), "no pages"),
        ("a.tif", 5, lambda p: p.write_bytes(tiff_bytes()[:900]), ""),
        ("a.png", 3, deep_colours, "convert it to TIFF"),
        ("a.gif", 1, lambda p: Image.new("P", (4, 4)).save(p), "mode P has no channels"),
        ("a.png", 3, lambda p: Image.new("L", (4, 4)).save(p), "has 1 channels, not 3"),
    ],
)  # fmt: skip
def test_what_is_no_such_image_is_bad(name: str, channels: int, make, reason: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    found = read(Folder(tmp_path, Stored(channels)), 0)
    assert isinstance(found, Bad) and reason in found.reason


def tiff_bytes() -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values(), photometric="minisblack")
    return file.getvalue()


def test_a_file_that_is_too_large_once_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 20, 30), np.uint16), photometric="minisblack", compression="zlib")
    monkeypatch.setattr(module, "MAX_DECODED", 5999)
    found = read(Folder(tmp_path, Stored(5)), 0)
    assert isinstance(found, Bad) and "6000 bytes once decoded" in found.reason


def test_bad_files_are_replaced_and_reported(tmp_path: Path) -> None:
    arrays = write(tmp_path, 2)
    (tmp_path / "0.npy").write_bytes(b"broken")
    image, bad = whole(tmp_path, 5)[0, 0]
    np.testing.assert_array_equal(image.numpy(), arrays[1].astype(np.float32))
    assert [Path(one.path).name for one in bad] == ["0.npy"]


def test_members_of_a_tar_file_are_read_as_files_are(tmp_path: Path) -> None:
    write(tmp_path / "a", 2)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
    ours, files = whole(tmp_path / "a.tar", 5), whole(tmp_path / "a", 5)
    for i in range(2):
        assert torch.equal(ours[0, i][0], files[0, i][0])


def test_arrays_of_eight_bits_are_pictures_too(tmp_path: Path) -> None:
    """Without another option, in a folder as in a tar file; others are told how they can be read."""
    np.save(tmp_path / "a.npy", noise(20, 30))
    np.save(tmp_path / "b.npy", noise(20, 30)[..., 0])
    np.save(tmp_path / "c.npy", values(1)[0])
    source = open_source(str(tmp_path), 3)
    np.testing.assert_array_equal(source.read(0), noise(20, 30))
    np.testing.assert_array_equal(source.read(1), noise(20, 30)[..., :1].repeat(3, 2))
    assert source.read(0).mode == "RGB"  # type: ignore[union-attr]
    found = read(source, 2)
    assert isinstance(found, Bad) and "--values stored" in found.reason
    crops = Crops(source, (20, 30), (1.0, 1.0), (1.5, 1.5), 0.0, 0)
    np.testing.assert_array_equal(crops[0, 0][0].permute(1, 2, 0), noise(20, 30))


def test_arrays_beside_images_are_something_else(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", np.zeros((4, 4), np.uint8))
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert Folder(tmp_path, 3).names == ["a.png"]
