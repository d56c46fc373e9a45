"""Unreadable files are skipped and listed; too many end the run."""

import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.data import Bad, Folder
from leanmim.errors import UserError
from leanmim.processes import ALONE
from leanmim.run import Run
from leanmim.train import bad_files
from leanmim.train.bad_files import BadFiles
from leanmim.train.pretrain import pretrain
from tests.runs import arguments


@pytest.fixture
def spoilt(tiny: Pretrain, tmp_path: Path) -> Pretrain:
    """The photos with two broken files among them; every epoch reads all."""
    folder = tmp_path / "photos"
    shutil.copytree(tiny.data, folder)
    whole = (folder / "cat.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "letter.jpg").write_text("Dear Sir or Madam")
    return replace(tiny, data=str(folder), batch_size=6, epochs=1)


def skipped(config: Pretrain) -> Iterator[tuple[str, str]]:
    for line in map(json.loads, Run(Path(config.out)).skipped.read_text().splitlines()):
        yield Path(line["path"]).name, line["reason"]


@pytest.mark.results
def test_a_few_broken_files_are_skipped_counted_and_listed(
    spoilt: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(replace(spoilt, max_bad_share=0.5)))
    out, err = capsys.readouterr()
    assert not err
    assert f"2 unreadable files were skipped; they are listed in {Run(Path(spoilt.out)).skipped}" in out
    reasons = dict(skipped(spoilt))
    assert len(list(skipped(spoilt))) == 2
    assert set(reasons) == {"cut.jpg", "letter.jpg"}
    assert "truncated" in reasons["cut.jpg"]
    assert "UnidentifiedImageError" in reasons["letter.jpg"]
    assert (Path(spoilt.out) / "export/timm/model.safetensors").is_file()
    assert "letter.jpg" in (Path(spoilt.out) / "report.html").read_text()


def test_too_many_broken_files_end_the_run(spoilt: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments(replace(spoilt, max_bad_share=0.01)))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("leanmim: ")
    assert "Traceback" not in err
    for word in (
        "of 18 image files cannot be read",
        "--max-bad-share 0.01",
        str(Run(Path(spoilt.out)).skipped),
        "remove",
    ):
        assert word in err
    assert {name for name, _ in skipped(spoilt)} <= {"cut.jpg", "letter.jpg"}


def listed(config: Pretrain) -> BadFiles:
    run = Run(Path(config.out))
    run.folder.mkdir(exist_ok=True)
    return BadFiles(run, 18, 0.5, ALONE)


def test_the_remedies_of_the_message_work(spoilt: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command, with a larger share, or once the files are mended."""
    with pytest.raises(UserError, match="mend them, or remove them and give --data-changed accept, or raise the share"):
        pretrain(replace(spoilt, max_bad_share=0.01))
    letter = Path(spoilt.data) / "letter.jpg"
    letter.write_bytes(letter.with_name("cat.jpg").read_bytes())
    pretrain(replace(spoilt, max_bad_share=0.06, data_changed="accept"))  # one of 18
    assert [name for name, _ in skipped(spoilt)] == ["cut.jpg"]


def test_what_can_be_read_again_or_is_gone_leaves_the_list(spoilt: Pretrain, tmp_path: Path) -> None:
    folder, bad = Path(spoilt.data), listed(spoilt)
    paths = [str(folder / name) for name in ("bee.jpg", "letter.jpg", "cut.jpg", "gone\udcff.jpg")]
    for path in paths[:1]:
        bad.add([Bad(path, "away for a moment")])
    bad.seen = dict.fromkeys(paths, "why")
    bad.write()
    again = listed(spoilt)
    assert list(again.seen) == paths
    text = StringIO()
    again.retry([Folder(folder, 3)], Console(file=text))
    assert {Path(path).name for path in again.seen} == {"letter.jpg", "cut.jpg"}
    assert "2 of 4 files that could not be read can be now, or are gone" in " ".join(text.getvalue().split())
    assert dict(skipped(spoilt)).keys() == {"letter.jpg", "cut.jpg"} and listed(spoilt).seen == again.seen


def test_a_torn_or_garbled_list_keeps_its_readable_lines(spoilt: Pretrain) -> None:
    bad = listed(spoilt)
    good = json.dumps({"path": "a.jpg", "reason": "torn"}).encode()
    bad.run.skipped.write_bytes(b'\xff\xfe\n[1]\n{"path": 1}\n' + good + b"\n" + good[:9])
    bad = listed(spoilt)
    assert bad.seen == {"a.jpg": "torn"}
    bad.add([Bad("b.jpg", "new")])
    assert listed(spoilt).seen == {"a.jpg": "torn", "b.jpg": "new"}


def test_a_full_disk_leaves_the_list_behind(spoilt: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = listed(spoilt)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bad_files, "append_line", full)
        bad.add([Bad("a.jpg", "torn")])
    assert not listed(spoilt).seen
    bad.add([])
    assert listed(spoilt).seen == {"a.jpg": "torn"}
