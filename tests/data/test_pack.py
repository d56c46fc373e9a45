"""One tar file in the place of a folder: what is in it, and that training and evaluation are the same from it."""

import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from leanmim.classifier.finetune import finetune
from leanmim.classifier.recipes import RECIPES
from leanmim.config import Knn, Pack, Pretrain
from leanmim.data import Crops, Folder, Tar, open_source
from leanmim.data import pack as module
from leanmim.data.pack import pack
from leanmim.data.source import Away
from leanmim.errors import UserError
from leanmim.evaluators.knn import knn
from leanmim.run import Run, load
from leanmim.train.pretrain import pretrain
from tests.helpers import PHOTOS, equal
from tests.runs import noisy_tiles, pretrain_until, weights


def packed(tmp_path: Path, name: str = "photos.tar", **changes: Any) -> Path:
    return pack(replace(Pack(data=str(PHOTOS), out=str(tmp_path / name), size=48, workers=0), **changes))


def crops(data: str) -> Crops:
    return Crops(open_source(data, 3), (16, 16), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_every_image_is_there_shrunk_in_the_folders_order(
    form: Literal["jpeg", "raw"], workers: int, tmp_path: Path
) -> None:
    source, folder = open_source(str(packed(tmp_path, format=form, workers=workers)), 3), Folder(PHOTOS, 3)
    assert isinstance(source, Tar)
    assert source.names == [name + (".npy" if form == "raw" else "") for name in folder.names]
    for place in range(len(folder)):
        small, whole = source.read(place), folder.read(place)
        assert min(small.size) == 48
        assert small.width / small.height == pytest.approx(whole.width / whole.height, rel=0.02)
        want = np.asarray(whole.resize(small.size, Image.Resampling.BICUBIC), dtype=float)
        assert np.abs(np.asarray(small, dtype=float) - want).mean() < (8 if form == "jpeg" else 0.6)


def test_it_is_a_tar_file_that_others_read(tmp_path: Path) -> None:
    out = packed(tmp_path)
    with tarfile.open(out) as archive:
        names = archive.getnames()
        assert names[0] == "leanmim/pack.json" and names[-1] == "leanmim/index.json"
        assert names[1:-1] == Folder(PHOTOS, 3).names
        member = archive.extractfile("bee.jpg")
        assert member is not None
        with Image.open(member) as image:
            assert min(image.size) == 48


def test_small_images_stay_and_grey_ones_are_grey(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    Image.new("L", (30, 20), 77).save(tmp_path / "small" / "a.png")
    for channels, form in ((1, "raw"), (3, "raw"), (1, "jpeg")):
        out = packed(tmp_path, f"{channels}{form}.tar", data=str(tmp_path / "small"), channels=channels, format=form)
        for wanted in (1, 3):
            image = open_source(str(out), wanted).read(0)
            assert (image.size, image.mode) == ((30, 20), "L" if wanted == 1 else "RGB")
            assert np.abs(np.asarray(image).astype(int) - 77).max() <= 1


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 3), np.uint8, order="F"), np.zeros((4, 0, 3), np.uint8)]
)
def test_an_array_that_is_no_picture_is_bad(array: np.ndarray, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, array)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a.npy", file.getvalue()), ("b.npy", file.getvalue()[:-1]), ("c.npy", b"array")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match="none of the 3 image files can be read"):
        crops(str(tmp_path / "a.tar"))[0, 0]


def test_what_cannot_be_read_is_listed_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jpg").write_bytes((PHOTOS / "bee.jpg").read_bytes())
    (data / "b.jpg").write_bytes(b"no picture")
    out = packed(tmp_path, data=str(data))
    assert "1 files could not be read, see leanmim/skipped/ in it" in capsys.readouterr().out
    assert open_source(str(out), 3).names == ["a.jpg"]
    with tarfile.open(out) as archive:
        reason = archive.extractfile("leanmim/skipped/b.jpg")
        assert reason is not None and b"cannot identify image file" in reason.read()

    (data / "a.jpg").unlink()
    with pytest.raises(UserError, match="none of 1 sampled image files can be read"):
        packed(tmp_path, "none.tar", data=str(data))
    assert not (tmp_path / "none.tar").exists()


@pytest.mark.parametrize("after", [0, 1, 5, 15, 16])
def test_interrupted_and_continued_it_is_the_same_file(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of images, in the middle of one, and in the index."""
    whole = packed(tmp_path, "whole.tar").read_bytes()
    add, done = module.add, -1  # the options come first

    def interrupted(file: Any, name: str, data: bytes) -> int:
        nonlocal done
        if done == after:
            file.write(b"half a member" * 100)
            file.flush()
            raise KeyboardInterrupt
        done += 1
        return add(file, name, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "add", interrupted)
        packed(tmp_path)
    assert not (tmp_path / "photos.tar").exists()
    read: list[int] = []
    getitem = module.Shrunk.__getitem__
    monkeypatch.setattr(module.Shrunk, "__getitem__", lambda self, index: (read.append(index), getitem(self, index))[1])
    assert packed(tmp_path).read_bytes() == whole
    assert read[16:] == list(range(after, 16))  # sixteen for the estimate
    assert not list(tmp_path.glob("*.part"))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    out = packed(tmp_path)
    before = out.read_bytes()
    packed(tmp_path)  # complete
    for changes in ({"size": 50}, {"format": "raw"}, {"quality": 80}):
        with pytest.raises(UserError, match=r"not this pack of these images; choose another, or --overwrite"):
            packed(tmp_path, **changes)
    assert out.read_bytes() == before
    packed(tmp_path, size=50, overwrite=True)
    assert out.read_bytes() != before
    out.rename(tmp_path / "other.tar.part")
    (tmp_path / "download.tar.part").write_bytes(bytes(5000))
    for name in ("other.tar", "download.tar"):
        before = (tmp_path / f"{name}.part").read_bytes()
        with pytest.raises(UserError, match="the beginning of another pack"):
            packed(tmp_path, name)
        assert (tmp_path / f"{name}.part").read_bytes() == before
    (tmp_path / "killed.tar.part").write_bytes(bytes(700))  # in the first member
    packed(tmp_path, "killed.tar")
    with pytest.raises(UserError, match=r"must end in \.tar"):
        packed(tmp_path, "photos.zip")
    with pytest.raises(UserError, match="8-bit images of 1 or 3 channels; give the folder itself to --data"):
        packed(tmp_path, channels=5)
    with pytest.raises(UserError, match="is a folder"):
        (tmp_path / "folder.tar").mkdir()
        packed(tmp_path, "folder.tar")


def test_a_second_command_is_refused_while_one_packs(tmp_path: Path) -> None:
    with module.alone(tmp_path / "photos.tar"), pytest.raises(UserError, match="another process packs into"):
        packed(tmp_path)
    assert not list(tmp_path.iterdir())
    packed(tmp_path)


@pytest.mark.parametrize(
    "index",
    [{}, {"names": ["a.jpg"]}, {"names": ["a.jpg"], "offsets": [-5], "sizes": [10]}, [1, 2],
     {"names": ["a.jpg", "b.jpg"], "offsets": [0], "sizes": [1]}, {"names": ["a.jpg"], "offsets": ["x"], "sizes": [1]},
     {"names": ["a.jpg"], "offsets": [0], "sizes": [10**9]}],
)  # fmt: skip
def test_an_index_of_a_stranger(index: Any, tmp_path: Path) -> None:
    table = json.dumps(index).encode()
    (tmp_path / "a.tar").write_bytes(table.ljust(512) + module.MAGIC + f"0 {len(table)}\n".encode().ljust(512))
    with pytest.raises(UserError, match=r"a\.tar"):
        open_source(str(tmp_path / "a.tar"), 3)


def test_a_file_that_would_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"needs about .* MiB are free"):
        packed(tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_from_it_stops_and_continues_bit_for_bit(tiny: Pretrain, tmp_path: Path) -> None:
    config = replace(tiny, data=str(packed(tmp_path)), blr=0.01)
    whole = replace(config, out=str(tmp_path / "whole"), workers=2)
    pretrain(whole)
    pretrain_until(config, 3)
    pretrain(config)
    assert equal(weights(config), weights(whole))
    names = json.loads(Run(Path(config.out)).names.read_text())
    assert names["names"] == Folder(PHOTOS, 3).names and all(size > 500 for size in names["sizes"])


def test_a_labelled_pack_is_evaluated_and_fine_tuned_as_the_folder(tiny: Pretrain, tmp_path: Path) -> None:
    """Raw tiles that are no larger than the limit are those of the files."""
    pretrain(tiny)
    data = noisy_tiles(tmp_path / "labelled", 6, 4)
    out = packed(tmp_path, data=str(data), format="raw")
    for options in ({}, {"k": 1}):
        accuracies = [knn(Knn(run=tiny.out, data=str(of), device="cpu", workers=0, **options)) for of in (data, out)]
        assert dict(accuracies[0]) == dict(accuracies[1])
    base = replace(
        RECIPES["small"], start=tiny.out, epochs=1, batch_size=6, effective_batch=6, workers=0, device="cpu", data=str(data),
        out=str(tmp_path / "folder"),
    )  # fmt: skip
    other = replace(base, data=str(out), out=str(tmp_path / "pack"))
    finetune(base), finetune(other)
    states = [load(Run(Path(of.out)).last)["model"] for of in (base, other)]
    assert equal(*states)
    # without val
    single = packed(tmp_path, "classes.tar", data=str(data / "train"), format="raw")
    accuracies = [knn(Knn(run=tiny.out, data=str(of), device="cpu", workers=0)) for of in (data / "train", single)]
    assert dict(accuracies[0]) == dict(accuracies[1])


def shards(tmp_path: Path) -> Path:
    """Two WebDataset shards: images, labels as text, a hidden file, a folder."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as archive:
            for number, photo in enumerate(photos[8 * shard : 8 * shard + 8]):
                for suffix, data in (("jpg", photo.read_bytes()), ("cls", b"3"), ("npy", b"features")):
                    member = tarfile.TarInfo(f"{number:05}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            folder = tarfile.TarInfo("folder.jpg")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            archive.addfile(tarfile.TarInfo("._00000.jpg"))
    return tmp_path


def test_shards_by_a_pattern(tmp_path: Path) -> None:
    source = open_source(str(shards(tmp_path) / "shard-*.tar"), 3)
    assert source.names == [f"shard-{shard}/{number:05}.jpg" for shard in range(2) for number in range(8)]
    folder = Folder(PHOTOS, 3)
    for place in range(16):
        assert source.read(place).tobytes() == folder.read(place).tobytes()
    one, other = crops(str(tmp_path / "shard-*.tar")), crops(str(PHOTOS))
    assert all(torch.equal(one[2, place][0], other[2, place][0]) for place in range(16))
    assert pickle.loads(pickle.dumps(source)).names == source.names
    joined = open_source([str(tmp_path / "shard-0.tar"), str(tmp_path / "shard-1.tar")], 3)
    assert joined.names[8] == "1/00000.jpg"
    assert joined.read(8).tobytes() == folder.read(8).tobytes()
    for source in (joined, open_source(str(tmp_path / "shard-1.tar"), 3)):  # decoded no larger than it needs, there too
        assert source.cut(0, lambda width, height: (0, 0, width, height), (16, 16)).pixels.shape[0] < 200


@pytest.mark.parametrize("cut", [0, 100, 700, 5000])
def test_a_broken_file_is_named(cut: int, tmp_path: Path) -> None:
    whole = packed(tmp_path).read_bytes()
    (tmp_path / "broken.tar").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"broken\.tar"):
        open_source(str(tmp_path / "broken.tar"), 3)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UserError, match=r"empty\.tar' holds no images"):
        open_source(str(tmp_path / "empty.tar"), 3)


def test_a_file_that_went_away_is_waited_for_and_a_broken_member_is_bad(tmp_path: Path) -> None:
    out = packed(tmp_path)
    source = open_source(str(out), 3)
    assert isinstance(source, Tar)
    start, size = source.places[2, 1:].tolist()
    data = bytearray(out.read_bytes())
    data[start : start + size] = bytes(size)
    out.write_bytes(data)
    _, bad = crops(str(out))[0, 2]
    assert [(one.path, "cannot identify image file" in one.reason) for one in bad] == [(source.where(2), True)]
    os.rename(out, tmp_path / "elsewhere.tar")
    with pytest.raises(Away, match=r"photos\.tar cannot be reached"):
        source.read(0)
