"""Every image file below a folder is found, in a fixed order; other sources may be opened instead."""

import os
from pathlib import Path

import pytest

from leanmim.data import SUFFIXES, UNREADABLE, Folder, Source, list_images, open_source, source
from leanmim.errors import UserError
from tests.data.pictures import Files, touch, write


def test_images_are_found_at_any_depth_and_sorted(tmp_path: Path) -> None:
    names = ["b.png", "a.jpg", "z/deep/er/c.webp", "z/a.bmp", "m/1.gif", "m/10.tif", "m/2.tiff", "naïve ü.jpeg"]
    touch(tmp_path, *names)
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names)
    assert list_images(str(tmp_path)) == list_images(tmp_path)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_suffixes_count_in_any_case(tmp_path: Path, suffix: str) -> None:
    names = [f"a{suffix}", f"b{suffix.upper()}", f"c{suffix.title()}", f"d{suffix[:-1]}{suffix[-1].upper()}"]
    touch(tmp_path, *names)
    assert {file.name for file in list_images(tmp_path)} == set(names)


def test_what_is_no_image_or_hidden_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "notes.txt", "jpg", "b.jpg.part", "c.npy")
    touch(tmp_path, ".hidden.jpg", "._a.jpg", ".cache/d.jpg", "x/.y/e.png")
    (tmp_path / "folder.jpg").mkdir()
    assert list_images(tmp_path) == [tmp_path / "a.jpg"]


def test_a_hidden_folder_can_be_named_itself(tmp_path: Path) -> None:
    touch(tmp_path, ".data/a.jpg")
    assert list_images(tmp_path / ".data") == [tmp_path / ".data" / "a.jpg"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "self").symlink_to(tmp_path / "data" / "a")
    assert list_images(tmp_path / "data") == [tmp_path / "data" / "a" / "1.jpg", tmp_path / "data" / "linked" / "2.jpg"]


def test_of_two_ways_to_a_folder_the_first_by_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "real/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    walk = os.walk

    def backwards(*args, **kwargs):  # a file system lists folders in any order
        for here, folders, names in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield here, folders, names

    monkeypatch.setattr(os, "walk", backwards)
    assert list_images(tmp_path) == [tmp_path / "link" / "1.jpg"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["there is no folder", "--data takes a folder of images"]),
        (lambda path: path.mkdir(), ["holds no files", "leanmim reads", "jpg", "png", "tiff"]),
        (lambda path: touch(path, "a.txt", "b/c.csv"), ["holds 2 files but no images", "leanmim reads", "webp"]),
        (lambda path: touch(path, ".a.jpg"), ["holds no files"]),
        (lambda path: path.touch(), ["is a file", "--data takes a folder of images"]),
    ],
    ids=["missing", "empty", "no images", "hidden only", "file"],
)
def test_a_folder_without_images_is_an_error_with_a_remedy(tmp_path: Path, make, words: list[str]) -> None:
    path = tmp_path / "photos.jpg"
    make(path)
    with pytest.raises(UserError) as error:
        list_images(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_a_folder_is_a_source_whose_names_do_not_depend_on_where_it_is(tmp_path: Path) -> None:
    for root in ("here", "there"):
        write(tmp_path / root / "a.png", 5, 7)
        write(tmp_path / root / "deep" / "b.png", 4, 4)
        touch(tmp_path / root, "deep/c.png")
    one, two = (open_source(str(tmp_path / root), 1) for root in ("here", "there"))
    assert isinstance(one, Source) and isinstance(one, Folder)
    assert one.names == two.names == ["a.png", os.path.join("deep", "b.png"), os.path.join("deep", "c.png")]
    assert len(one) == 3
    assert one.where(1) == str(tmp_path / "here" / "deep" / "b.png")
    assert (one.read(0).size, one.read(0).mode) == ((7, 5), "L")
    assert open_source(str(tmp_path / "here"), 3).read(0).mode == "RGB"
    with pytest.raises(UNREADABLE):
        one.read(2)


def test_a_third_partys_source_is_asked_before_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.png")

    def opener(data: str, channels: int) -> Source | None:
        return Files([file, file], channels) if data.startswith("twice:") else None

    monkeypatch.setattr(source, "SOURCES", [opener])
    twice = open_source("twice:a.png", 3)
    assert isinstance(twice, Files) and isinstance(twice, Source)
    assert (len(twice), twice.channels) == (2, 3)
    assert isinstance(open_source(str(tmp_path), 3), Folder)
    monkeypatch.setattr(source, "SOURCES", [])
    with pytest.raises(UserError, match="there is no folder 'twice:a"):
        open_source("twice:a.png", 3)
