"""Tar files at URLs, and names with braces. The server is this machine."""

import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from leanmim.data import absolute, open_source, remote
from leanmim.data.read import read_image
from leanmim.errors import CannotWrite, UserError
from tests.helpers import PHOTOS

pytest.importorskip("webdataset")

FILES = sorted(PHOTOS.glob("*.jpg"))


class Handler(SimpleHTTPRequestHandler):
    """Writes down what is asked for, and answers broken-off.tar with less than it promises."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path != "/broken-off.tar":
            super().do_GET()
            return
        whole = Path(self.directory, "shard-000.tar").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[: len(whole) // 2])

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three tar files of two photos each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as archive:
            for file in FILES[2 * number : 2 * number + 2]:
                archive.add(file, file.name)
    return folder


@pytest.fixture
def url(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server of the shards; the cache is in the test's own folder."""
    monkeypatch.setenv("LEANMIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Handler, "asked", [], raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_are_copied_once_and_read_as_local_files(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"{url}/shard-{{000..002}}.tar"
    source = open_source(data, 3)
    assert source.names == [f"shard-{place // 2:03d}/{file.name}" for place, file in enumerate(FILES[:6])]
    assert [source.read(place) for place in (1, 5)] == [read_image(FILES[place], 3) for place in (1, 5)]
    assert Handler.asked == [f"/shard-00{number}.tar" for number in range(3)]
    assert open_source(data, 3).names == source.names and len(Handler.asked) == 3
    assert f"3 of 3 tar files are copied to {tmp_path / 'cache'}" in capsys.readouterr().err
    assert absolute(data) == data


def test_a_missing_file_is_named_and_the_others_stay(url: str, shards: Path) -> None:
    (shards / "shard-001.tar").rename(shards / "away")
    with pytest.raises(UserError, match=r"/shard-001.tar' cannot be fetched .*; see whether it is there"):
        open_source(f"{url}/shard-{{000..002}}.tar", 3)
    (shards / "away").rename(shards / "shard-001.tar")
    assert len(open_source(f"{url}/shard-{{000..002}}.tar", 3)) == 6
    assert Handler.asked.count("/shard-000.tar") == 1


def test_what_is_broken_off_or_no_tar_file_is_named_and_not_kept(url: str, shards: Path, tmp_path: Path) -> None:
    (shards / "page.tar").write_text("<html>Not what you think</html>")
    whole = (shards / "shard-000.tar").read_bytes()
    (shards / "half.tar").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("broken-off", "cannot be fetched"),
        ("page", "is no whole tar file of images: .*cannot be read as a tar file"),
        ("half", "is no whole tar file of images: .*unexpected end"),
    ):
        with pytest.raises(UserError, match=rf"{url}/{name}.tar' {words}"):
            open_source(f"{url}/{name}.tar", 3)
    assert not list(tmp_path.glob("cache/**/*.tar*"))


def test_too_little_room_is_told_before_the_disk_is_full(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = remote.shutil.disk_usage
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(UserError, match=r"2 more tar files take about .* are free; .*LEANMIM_CACHE"):
        open_source(f"{url}/shard-{{000..002}}.tar", 3)
    assert Handler.asked == ["/shard-000.tar"]


def test_a_cache_that_cannot_be_written_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LEANMIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(CannotWrite, match="cannot be written"):
        open_source(f"{url}/shard-000.tar", 3)


def test_names_with_braces_may_be_local(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(open_source(f"{shards}/shard-{{000..002}}.tar", 3)) == 6
    with pytest.raises(UserError, match=r"shard-003.tar' cannot be read as a tar file"):
        open_source(f"{shards}/shard-{{000..003}}.tar", 3)
    monkeypatch.chdir(shards)
    assert absolute("shard-{000..002}.tar") == f"{shards}/shard-{{000..002}}.tar"
    (shards / "shard-000.tar").rename(shards / "a{1}.tar")
    assert len(open_source("a{1}.tar", 3)) == 2


def test_other_schemes_are_left_to_third_parties_and_no_program_is_started(tmp_path: Path) -> None:
    assert remote.open_remote("gopher://a/b.tar", 3) is None
    with pytest.raises(UserError, match=r"would start a program; run it yourself"):
        open_source(f"pipe:touch {tmp_path}/started", 3)
    assert not (tmp_path / "started").exists()


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r'pip install "leanmim\[webdataset\]"'):
        open_source("https://127.0.0.1/a.tar", 3)
