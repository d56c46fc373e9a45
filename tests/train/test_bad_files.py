"""Unreadable files are skipped and listed; too many end the run."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.run import Run
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
