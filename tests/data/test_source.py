"""What --data names is opened: a folder, a pattern, a list, several of them, a third party's source."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from leanmim.cli import parse
from leanmim.config import Pretrain
from leanmim.data import UNREADABLE, Files, Folder, Source, absolute, open_source, source
from leanmim.data.source import Away, sizes_of
from leanmim.errors import UserError
from tests.data import pictures
from tests.data.pictures import touch, tree, write


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
        return pictures.Files([file, file], channels) if data.startswith("twice:") else None

    monkeypatch.setattr(source, "SOURCES", [opener])
    twice = open_source("twice:a.png", 3)
    assert isinstance(twice, pictures.Files) and isinstance(twice, Source)
    assert (len(twice), twice.channels) == (2, 3)
    assert isinstance(open_source(str(tmp_path), 3), Folder)
    monkeypatch.setattr(source, "SOURCES", [])
    with pytest.raises(UserError, match="there is no folder 'twice:a"):
        open_source("twice:a.png", 3)


def test_names_below_a_pattern_do_not_depend_on_where_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "photos", "a/raw/1.png", "b/raw/2.png", "b/small/3.png")
    absolute_one = open_source(f"{tmp_path}/photos/*/raw", 3)
    monkeypatch.chdir(tmp_path / "photos")
    relative = open_source("*/raw", 3)
    assert (
        absolute_one.names == relative.names == [os.path.join("a", "raw", "1.png"), os.path.join("b", "raw", "2.png")]
    )
    assert relative.where(0) == os.path.join("a", "raw", "1.png")
    assert relative.read(1) == absolute_one.read(1)


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    tree(tmp_path, "2024 [raw]/1.png")
    assert open_source(str(tmp_path / "2024 [raw]"), 3).names == ["1.png"]


def test_a_list_is_a_source_in_its_own_order(tmp_path: Path) -> None:
    tree(tmp_path, "b.png", "a.png", "c.png")
    (tmp_path / "some.txt").write_text("b.png\na.png\n")
    one = open_source(str(tmp_path / "some.txt"), 1)
    assert isinstance(one, Source) and isinstance(one, Files)
    assert one.names == ["b.png", "a.png"]
    assert one.where(0) == str(tmp_path / "b.png")
    assert one.read(0).mode == "L"


def test_several_are_joined_and_their_names_begin_with_the_position(tmp_path: Path) -> None:
    tree(tmp_path, "x/a.png", "x/b.png", "y/a.png")
    for root in (tmp_path, tmp_path / "moved"):
        if root != tmp_path:
            tree(root, "x/a.png", "x/b.png", "y/a.png")
        both = open_source((str(root / "y"), str(root / "x")), 3)
        assert isinstance(both, Source)
        assert both.names == ["0/a.png", "1/a.png", "1/b.png"]
    assert both.where(1) == str(root / "x" / "a.png")
    assert both.read(2) == open_source(str(root / "x"), 3).read(1)
    assert open_source((str(tmp_path / "x"),), 3).names == ["a.png", "b.png"]
    with pytest.raises(UserError, match="there is no folder"):
        open_source((str(tmp_path / "x"), str(tmp_path / "z")), 3)


def test_an_image_that_two_folders_share_counts_once(tmp_path: Path) -> None:
    tree(tmp_path, "x/a.png", "x/deep/b.png", "y/c.png")
    (tmp_path / "y" / "link.png").symlink_to(tmp_path / "x" / "a.png")
    names = open_source((str(tmp_path / "x" / "deep"), str(tmp_path / "x"), str(tmp_path / "y")), 3).names
    assert names == ["0/b.png", "1/a.png", "2/c.png"]


def test_equal_names_of_third_parties_are_different_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.png")
    monkeypatch.setattr(source, "SOURCES", [lambda data, channels: pictures.Files([file, file], channels)])
    assert open_source(("one", "two"), 3).names == ["0/a.png", "0/a.png", "1/a.png", "1/a.png"]


def test_paths_of_data_become_absolute_and_other_words_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "x/a.png")
    monkeypatch.chdir(tmp_path)
    assert absolute("x") == str(tmp_path / "x")
    assert absolute(("x", "*/a.png", "twice:x")) == (str(tmp_path / "x"), str(tmp_path / "*" / "a.png"), "twice:x")
    assert absolute("nowhere/*") == "nowhere/*"


@pytest.mark.parametrize(("words", "data"), [("x", "x"), ("x y/*", ("x", "y/*"))])
def test_one_and_several_on_the_command_line(words: str, data: str | tuple[str, ...]) -> None:
    _, config = parse(["pretrain", "mae", "--data", *words.split(), "--out", "run"])
    assert config.data == data
    assert Pretrain.from_json(json.loads(json.dumps(config.to_json()))).data == data


def test_vanished_broken_and_away_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "x/a.png", "x/deep/b.png")
    touch(tmp_path, "x/broken.png")
    images = open_source(str(tmp_path / "x"), 3)
    shutil.rmtree(tmp_path / "x" / "deep")
    assert images.names == ["a.png", "broken.png", os.path.join("deep", "b.png")]
    for place in (1, 2):  # the root is there
        with pytest.raises(UNREADABLE):
            images.read(place)
    with monkeypatch.context() as patch:
        patch.setattr(source, "read_image", raiser(OSError(errno.ESTALE, "Stale file handle")))
        with pytest.raises(Away, match=r"a\.png cannot be reached \(Stale file handle\); mount their drive"):
            images.read(0)
        patch.setattr(source, "read_image", raiser(OSError(errno.EACCES, "Permission denied")))
        with pytest.raises(UNREADABLE):
            images.read(0)
    for file in ("a.png", "broken.png"):
        (tmp_path / "x" / file).unlink()
    with pytest.raises(Away):  # the folder is empty, as without its drive
        images.read(0)
    (tmp_path / "x").rmdir()
    with pytest.raises(Away):
        images.read(0)


def raiser(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_sizes_are_those_that_a_source_knows_or_those_of_its_files(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"12345")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    joined = open_source([str(tmp_path / "a"), str(tmp_path / "b")], 3)
    size = (tmp_path / "a" / "1.png").stat().st_size
    assert sizes_of(joined) == [size, 5, (tmp_path / "b" / "1.png").stat().st_size, None]

    class Own:
        names = ("x", "y")

        def __len__(self) -> int:
            return 2

        def read(self, index: int) -> Image.Image:
            raise OSError

        def where(self, index: int) -> str:
            return str(tmp_path / "a" / "2.png") if index else "nowhere"

    assert sizes_of(Own()) == [None, 5]
