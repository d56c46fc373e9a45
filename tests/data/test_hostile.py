"""Hostile and odd files become a picture or have a reason: no hang, no crash, no unbounded memory."""

import os
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leanmim.data import UNREADABLE, Bad, Crops, Folder, centre_crop, read_image
from leanmim.data import crops as crops_module
from leanmim.data import read as read_module
from leanmim.data.readable import image_batches
from tests import corpus
from tests.data.pictures import noise


@pytest.mark.parametrize("channels", [1, 3])
def test_odd_files_become_pictures(tmp_path: Path, channels: int) -> None:
    for name, data in corpus.readable().items():
        (tmp_path / name).write_bytes(data)
    source = Folder(tmp_path, channels)
    data = Crops(source, (16, 16), (0.2, 1.0), (0.75, 4 / 3), 0.5, 0)
    assert len(source) == len(corpus.readable())
    for place in range(len(source)):
        assert centre_crop((16, 16))(source.read(place)).shape == (channels, 16, 16)
        crop, bad = data[0, place]
        assert crop.shape == (channels, 16, 16) and not bad


def test_broken_files_have_a_reason(tmp_path: Path) -> None:
    for name, data in corpus.broken().items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UNREADABLE, match=r"\S"):
            read_image(tmp_path / name, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = corpus.unusual(tmp_path)
    whole = tmp_path / "whole.png"
    whole.write_bytes(corpus.png(4, 4, bytes(52)))
    (tmp_path / "folder.jpg").mkdir()  # a folder like any other
    (tmp_path / "folder.jpg" / "inside.png").write_bytes(whole.read_bytes())
    opened: list[str] = []
    really = open

    def watched(path: Path | str, *rest: object) -> object:
        opened.append(str(path))
        assert stat.S_ISREG(os.stat(path).st_mode)
        return really(path, *rest)  # type: ignore[call-overload]

    monkeypatch.setattr(read_module, "open", watched, raising=False)
    found: list[Bad] = []
    ((_, places),) = image_batches(Folder(tmp_path, 3), centre_crop((4, 4)), 99, 0, found.extend)
    assert {bad.path for bad in found} == {str(path) for path in paths}
    assert [Path(path).name for path in opened] == ["inside.png", "whole.png"] and len(places) == 2
    reasons = {Path(bad.path).name: bad.reason for bad in found}
    assert "no regular file" in reasons["fifo.jpg"] and "no regular file" in reasons["device.jpg"]
    assert "2147483648 bytes, more than" in reasons["sparse.png"]


def test_other_formats_do_not_reach_their_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript."""
    (tmp_path / "a.jpg").write_bytes(corpus.EPS)
    Image.init()
    monkeypatch.setitem(Image.OPEN, "EPS", (lambda *_: pytest.fail("EPS was opened"), None))
    with pytest.raises(UNREADABLE, match="cannot identify"):
        read_image(tmp_path / "a.jpg", 3)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), OverflowError("large"), KeyError("tag")])
def test_whatever_pillow_raises_is_the_files(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(corpus.png(4, 4, bytes(52)))

    def fail(_: Image.Image) -> Image.Image:
        raise error

    monkeypatch.setattr(read_module.ImageOps, "exif_transpose", fail)
    with pytest.raises(UNREADABLE):
        read_image(tmp_path / "a.png", 3)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_a_file_that_takes_too_long_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(corpus.png(4, 4, bytes(52)))
    before = signal.getsignal(signal.SIGVTALRM)

    def endless(_: Image.Image) -> Image.Image:
        while True:
            pass

    monkeypatch.setattr(read_module, "MAX_SECONDS", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(read_module.ImageOps, "exif_transpose", endless)
        with pytest.raises(UNREADABLE, match=r"longer than 0\.05 s"):
            read_image(tmp_path / "a.png", 3)
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000)  # somebody else's timer stays as it is
    try:
        read_image(tmp_path / "a.png", 3)
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def test_16_bits_are_scaled_band_by_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (50, 30), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    seen = []
    bands = read_module.bands

    def watched(image: Image.Image):
        for band in bands(image):
            seen.append(band.size)
            yield band

    monkeypatch.setattr(read_module, "BAND", 200)
    monkeypatch.setattr(read_module, "bands", watched)
    assert (np.asarray(read_image(tmp_path / "a.png", 1)) == np.rint(values / 257)).all()
    assert max(seen) <= 200 and len(seen) > 10


@pytest.mark.parametrize("shape", [(20000, 1), (1, 20000)])
def test_of_a_strip_only_the_centre_is_enlarged(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    crop = centre_crop((224, 224))(Image.new("RGB", shape, (7, 8, 9)))
    assert sizes == [(224, 224)] and crop.shape == (3, 224, 224) and (crop[1] == 8).all()


@pytest.mark.parametrize("shape", [(60, 12), (12, 61), (40, 40)])
def test_the_centre_of_a_strip_is_that_of_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(noise(shape[1], shape[0])).resize(shape, Image.Resampling.BICUBIC)
    whole = centre_crop((32, 32), 0.9)(image).int()
    monkeypatch.setattr(crops_module, "LARGE", 0)
    part = centre_crop((32, 32), 0.9)(image).int()
    assert (whole - part).abs().max() <= 20 and (whole - part).abs().float().mean() < 0.5


def test_two_hundred_mutated_files_are_read_or_have_a_reason(tmp_path: Path) -> None:
    path, found = tmp_path / "a.jpg", []
    for data in corpus.fuzz(200, seed=7):
        path.write_bytes(data)
        found.append(corpus.outcome(path))
    assert set(found) == {"readable", "bad"}


def test_mutations_are_a_function_of_the_seed() -> None:
    first, again, other = (list(corpus.fuzz(20, seed)) for seed in (1, 1, 2))
    assert first == again and first != other
