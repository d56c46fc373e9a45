"""Datasets of Hugging Face's library on disk: saved folders and Parquet files."""

import errno
import os
import pickle
import socket
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import Table
from pyarrow.parquet import write_table

from leanmim.classifier.finetune import finetune
from leanmim.classifier.recipes import RECIPES
from leanmim.config import Pretrain
from leanmim.data import Bad, Hub, batches, centre_crop, labelled_pair, open_source
from leanmim.data.labels import choose_labels
from leanmim.data.read import read_image
from leanmim.data.source import cut_of, read
from leanmim.errors import CannotWrite, UserError
from leanmim.processes import Process
from tests.helpers import PHOTOS, equal

datasets = pytest.importorskip("datasets")

FILES = sorted(PHOTOS.glob("*.jpg"))
NAMES = ["bird", "a/b", "sheep"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache" / "downloads"))


def photos(files: list[Path], image: str = "image", label: str = "label") -> Any:
    """A dataset of files, labelled in turn."""
    kinds = {image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)}
    values = {
        image: [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        label: [place % 3 for place in range(len(files))],
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))


def parquet(folder: Path, split: str = "train", count: int = 3) -> Path:
    """So many files with all photos."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        part = photos(FILES).shard(count, number, contiguous=True)
        part.to_parquet(str(folder / f"{split}-{number:05d}-of-{count:05d}.parquet"))
    return folder


def test_a_saved_dataset_is_its_images_undecoded(tmp_path: Path) -> None:
    photos(FILES).with_format("torch").save_to_disk(str(tmp_path / "saved"), num_shards=3)
    source = open_source(str(tmp_path / "saved"), 3)
    assert isinstance(source, Hub) and len(source) == 16
    assert source.names[:3] == ["bird/00000000", "a_b/00000001", "sheep/00000002"]
    assert source.sizes == [file.stat().st_size for file in FILES]
    for place in (0, 7, 15):
        assert source.read(place) == read_image(FILES[place], 3)
    cut = cut_of(source, 3, lambda width, height: (0, 0, width, height), (16, 16))
    assert cut.pixels.shape[0] < read_image(FILES[3], 3).height / 4  # a JPEG at a reduced scale
    assert source.where(1) == f"{tmp_path}/saved: a_b/00000001"


def test_parquet_files_are_read_as_a_file_a_folder_a_repository_or_a_pattern(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "repository" / "data")
    (tmp_path / "repository" / "README.md").write_text("a card")
    (tmp_path / "repository" / ".git").mkdir()
    for data in (folder, folder.parent, f"{folder}/train-*.parquet"):
        source = open_source(str(data), 3)
        assert source.names[:2] == ["train/bird/00000000", "train/a_b/00000001"] and len(source) == 16
        assert [source.read(place) for place in (0, 9)] == [read_image(FILES[place], 3) for place in (0, 9)]
    assert len(open_source(str(folder / "train-00001-of-00003.parquet"), 3)) == 5


def test_opening_asks_nothing_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(FILES).save_to_disk(str(tmp_path / "saved"))
    parquet(tmp_path / "data")
    asked: list[Any] = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: asked.append(arguments) or [])
    for name in ("saved", "data"):
        assert open_source(str(tmp_path / name), 3).read(0) == read_image(FILES[0], 3)
    assert asked == []


def test_a_path_with_the_characters_of_a_pattern_is_a_path(tmp_path: Path) -> None:
    assert len(open_source(str(parquet(tmp_path / "2024 [raw]", count=1)), 3)) == 16


def test_bytes_and_path_are_an_image_without_the_librarys_type(tmp_path: Path) -> None:
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in FILES[:4]]
    write_table(Table.from_pydict({"picture": rows, "caption": ["x"] * 4}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), 1)
    assert source.names == ["00000000", "00000001", "00000002", "00000003"]
    assert source.read(2) == read_image(FILES[2], 1)


def test_images_beside_parquet_files_stay_a_folder_of_images(tmp_path: Path) -> None:
    parquet(tmp_path, count=1)
    (tmp_path / "1.jpg").write_bytes(FILES[0].read_bytes())
    assert open_source(str(tmp_path), 3).names == ["1.jpg"]
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.jpg").write_bytes(FILES[0].read_bytes())
    assert open_source(str(tmp_path), 3).names == [os.path.join("data", "1.jpg")]


def test_a_broken_image_is_passed_over_and_named(tmp_path: Path) -> None:
    whole = {"bytes": FILES[0].read_bytes(), "path": "whole.jpg"}
    broken: list[Any] = [{"bytes": b"no picture", "path": "x.jpg"}, {"bytes": None, "path": None}, None]
    broken += [{"bytes": None, "path": str(tmp_path / "gone.jpg")}]
    write_table(Table.from_pydict({"image": [whole, *broken]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), 3)
    found = [read(source, place) for place in range(5)]
    assert found[0] == read_image(FILES[0], 3)
    reasons = [bad.reason for bad in found[1:] if isinstance(bad, Bad)]
    assert ["no image" in reason for reason in reasons[1:3]] == [True, True]
    assert "UnidentifiedImageError" in reasons[0] and "No such file" in reasons[3]


def test_a_missing_or_broken_shard_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    photos(FILES).save_to_disk(str(saved), num_shards=3)
    shard = saved / "data-00001-of-00003.arrow"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense" * 100):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"saved' .*data-00001-of-00003.arrow.*; write or download it again"):
            open_source(str(saved), 3)
    shard.unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003.arrow"):
        open_source(str(saved), 3)
    shard.write_bytes(whole)
    (saved / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a dataset"):
        open_source(str(saved), 3)


def test_a_missing_or_broken_parquet_file_is_named(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "data")
    shard = folder / "train-00001-of-00003.parquet"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"data' .*train-00001-of-00003.parquet .*; write or download it again"):
            open_source(str(folder), 3)
    shard.unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards are missing, the first: .*/train-00001-of-00003.parquet"):
        open_source(str(folder), 3)
    assert len(open_source(f"{folder}/*.parquet", 3)) == 11


def test_a_full_disk_is_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet(tmp_path / "data")

    def full(_: list[str]) -> None:
        raise RuntimeError("while generating the dataset") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    with pytest.raises(CannotWrite, match=rf"{tmp_path}/cache' cannot be written: No space left .*make room"):
        open_source(str(folder), 3)


def test_without_the_library_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parquet(tmp_path / "data", count=1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "leanmim\[hub\]"'):
        open_source(str(folder), 3)


def test_no_image_column_or_several_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(UserError, match=r"no column of images; the columns text; call one 'image'"):
        open_source(str(tmp_path / "texts"), 3)
    pair = datasets.concatenate_datasets([photos(FILES[:2], name, f"of {name}") for name in ("left", "right")], axis=1)
    pair.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"several columns of images \(left, right\)"):
        open_source(str(tmp_path / "both"), 3)


def test_the_splits_are_train_and_val_and_a_folder_of_one_is_that_one(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    splits = {"train": photos(FILES[:9]), "validation": photos(FILES[9:12]), "test": photos(FILES[12:])}
    datasets.DatasetDict(splits).save_to_disk(str(saved))
    assert len(open_source(str(saved), 3)) == 16
    assert open_source(str(saved / "test"), 3).read(0) == read_image(FILES[12], 3)
    labels = choose_labels(saved)
    assert labels.classes == ["a_b", "bird", "sheep"]
    assert sorted(labels.train_labels) == [0] * 3 + [1] * 3 + [2] * 3 and labels.val_labels == [0, 1, 2]
    assert labels.notes == ["only train and val are read, not test"]
    train, val = labelled_pair(saved, 3, centre_crop((16, 16)))
    place = val.source.names.index("val/a_b/00000001")
    image, label = val[place]
    assert (len(train), len(val), label, val.held_out) == (9, 3, 0, False)
    assert equal(image, centre_crop((16, 16))(read_image(FILES[10], 3)))


def test_which_column_holds_the_labels(tmp_path: Path) -> None:
    fine = datasets.Features({"fine": datasets.ClassLabel(names=["x"])})
    two = datasets.concatenate_datasets(
        [photos(FILES[:4], "img", "coarse"), datasets.Dataset.from_dict({"fine": [0] * 4}, features=fine)], axis=1
    )
    two.save_to_disk(str(tmp_path / "two"))
    assert open_source(str(tmp_path / "two"), 3).names[0] == "00000000"
    with pytest.raises(UserError, match=r"no column of labels among img, coarse, fine; .*called 'label'"):
        choose_labels(tmp_path / "two")
    two.rename_column("coarse", "label").save_to_disk(str(tmp_path / "named"))
    assert open_source(str(tmp_path / "named"), 3).names[0] == "bird/00000000"
    unknown = photos(FILES[:1]).remove_columns("label").add_column("label", [-1])
    unknown.cast(photos(FILES[:1]).features).save_to_disk(str(tmp_path / "test"))
    assert open_source(str(tmp_path / "test"), 3).names == ["00000000"]


def test_every_image_once_an_epoch_over_workers_and_processes(tmp_path: Path, tiny: Pretrain) -> None:
    shades = [Image.new("L", (8, 8), 10 * place) for place in range(16)]
    made = datasets.Dataset.from_dict({"image": shades}, features=datasets.Features({"image": datasets.Image()}))
    made.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    source = open_source(str(tmp_path / "saved"), 1)
    config = replace(tiny, channels=1, input_size=(8,), workers=2)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for rank in range(2):
            for images, _ in batches(config, source, 2 * epoch, 2 * epoch + 2, Process(rank, 2)):
                seen.update(images[:, 0, 0, 0].tolist())
        assert seen == Counter(10 * place for place in range(16))


def test_the_images_go_on_at_any_step(tmp_path: Path, tiny: Pretrain) -> None:
    source = open_source(str(parquet(tmp_path / "data")), 3)
    whole = list(batches(replace(tiny, workers=1), source, 0, 8))
    assert equal(whole[3:], list(batches(tiny, source, 3, 8)))


def test_fine_tuning_takes_the_labels(tmp_path: Path, tiny: Pretrain) -> None:
    splits = {"train": photos(FILES[:12]), "validation": photos(FILES[12:])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    config = replace(
        RECIPES["small"], start="scratch", model=tiny.model, model_kwargs=tiny.model_kwargs, input_size=(32,), epochs=1,
        data=str(tmp_path / "saved"), out=str(tmp_path / "tuned"), batch_size=4, workers=0, device="cpu",
    )  # fmt: skip
    finetune(config)
    lines = (tmp_path / "tuned" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 5 and "val/" in lines[1]


def test_a_reader_is_sent_no_more_than_names(tmp_path: Path) -> None:
    """The images stay in the files, which every process maps."""
    photos(FILES).save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"), 3)
    sent = pickle.dumps(source)
    assert len(sent) < 10_000 < sum(size or 0 for size in source.sizes)
    again = pickle.loads(sent)
    assert np.array_equal(again.read(5), read_image(FILES[5], 3))
