"""A folder, a pattern and a list stand for image files, in a fixed order."""

import errno
import os
from pathlib import Path

import pytest

from leanmim.data import SUFFIXES, list_images
from leanmim.data.find import image_names, match_images, once, read_list
from leanmim.errors import UserError
from tests.data.pictures import touch


def test_images_are_found_at_any_depth_and_sorted(tmp_path: Path) -> None:
    names = ["b.png", "a.jpg", "z/deep/er/c.webp", "z/a.bmp", "m/1.gif", "m/10.tif", "m/2.tiff", "naïve ü.jpeg"]
    touch(tmp_path, *names)
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names)
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_the_order_is_that_of_paths_not_of_strings(tmp_path: Path) -> None:
    """Runs that began with an earlier version go on."""
    names = ["a b/1.jpg", "a-b.jpg", "a.jpg", "a/1.jpg", "a/b/1.jpg", "a/b.jpg", "a0.jpg", "Z.jpg", "ab/1.jpg"]
    touch(tmp_path, *names)
    assert image_names(tmp_path) == list(map(str, sorted(map(Path, names)))) != sorted(names)


@pytest.mark.parametrize("root", [".", "./", "photos/..", "photos/", "photos//", "./photos"])
def test_names_are_below_the_folder_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    touch(tmp_path, "photos/a/1.jpg")
    monkeypatch.chdir(tmp_path)
    inside = os.path.join("a", "1.jpg")
    assert image_names(root) == [inside if root.rstrip("/").endswith("photos") else os.path.join("photos", inside)]


def test_files_that_are_the_same_by_a_link_above_them_or_their_own_count_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/deep/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "1.jpg").symlink_to(tmp_path / "link" / "deep" / "1.jpg")
    names = ["link/deep/1.jpg", "real/deep/1.jpg", "1.jpg", "real/../real/deep/1.jpg"]
    assert once(names, tmp_path) == names[:1]
    assert once(names[::-1], tmp_path) == names[-1:]


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
        (lambda path: None, ["there is no folder", "give a folder of images"]),
        (lambda path: path.mkdir(), ["holds no files", "leanmim reads", "jpg", "png", "tiff"]),
        (lambda path: touch(path, "a.txt", "b/c.csv"), ["holds 2 files but no images", "leanmim reads", "webp"]),
        (lambda path: touch(path, ".a.jpg"), ["holds no files"]),
        (lambda path: path.touch(), ["is a file", "give a folder of images"]),
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


def test_a_pattern_matches_folders_and_files(tmp_path: Path) -> None:
    touch(
        tmp_path, "a/raw/2.jpg", "a/raw/1.png", "b/raw/deep/3.jpg", "b/raw/notes.txt", "b/small/4.jpg", ".c/raw/5.jpg"
    )
    assert match_images(f"{tmp_path}/*/raw") == [
        f"{tmp_path}/a/raw/1.png",
        f"{tmp_path}/a/raw/2.jpg",
        f"{tmp_path}/b/raw/deep/3.jpg",
    ]
    assert match_images(f"{tmp_path}/[ab]/*/?.jpg") == [
        f"{tmp_path}/a/raw/2.jpg",
        f"{tmp_path}/b/small/4.jpg",
    ]


def test_what_a_pattern_reaches_in_two_ways_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/b/2.jpg")
    (tmp_path / "z.jpg").symlink_to(tmp_path / "a" / "1.jpg")
    assert match_images(f"{tmp_path}/**") == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/a/b/2.jpg"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images would be missing. A test as root may list every folder."""
    touch(tmp_path, "a/1.jpg", "locked/2.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for find in (lambda: list_images(tmp_path), lambda: match_images(f"{tmp_path}")):
        with pytest.raises(
            UserError, match=r"locked' cannot be listed \(Permission denied\); .*right to read"
        ) as error:
            find()
        assert str(tmp_path) in str(error.value)


def test_a_pattern_without_images_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.txt", "a/2.csv")
    with pytest.raises(UserError, match=r"a/\*.* matches 2 files but no images; leanmim reads avif, bmp"):
        match_images(f"{tmp_path}/a/*")
    with pytest.raises(UserError, match="matches no files"):
        match_images(f"{tmp_path}/c/*")


def test_a_list_names_one_file_a_line(tmp_path: Path) -> None:
    touch(tmp_path, "lists/a.jpg", "b c.png", "naïve.jpg", "d.dat")
    lines = ["a.jpg", "../b c.png", "", str(tmp_path / "naïve.jpg"), "../d.dat", "../lists/a.jpg"]
    file = tmp_path / "lists" / "train.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert read_list(file) == ["a.jpg", "../b c.png", str(tmp_path / "naïve.jpg"), "../d.dat"]


def test_lines_that_name_no_file_are_an_error_that_gives_the_first(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    file = tmp_path / "train.txt"
    file.write_text("".join(f"{name}.jpg\n" for name in "abcde"))
    with pytest.raises(UserError) as error:
        read_list(file)
    assert "4 of 5 lines" in str(error.value) and "b.jpg, c.jpg, d.jpg, ..." in str(error.value)
    assert f"relative to {str(tmp_path)!r}" in str(error.value)


@pytest.mark.parametrize(("content", "words"), [(b"\n \n", "is empty"), (b"\xff\xfe\n", "cannot be read")])
def test_a_list_that_is_none_is_an_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_list(tmp_path / "train.txt")
