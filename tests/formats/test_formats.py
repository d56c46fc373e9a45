"""Where an export is written."""

from pathlib import Path

import pytest

from leanmim.config import Export, Pretrain
from leanmim.errors import CannotWrite, UserError
from leanmim.formats import export
from leanmim.start import open_start
from tests.helpers import fake_run


def test_an_export_elsewhere_is_not_overwritten_unasked(tiny: Pretrain, tmp_path: Path) -> None:
    run, out = fake_run(tiny, Path(tiny.out)), str(tmp_path / "shared")
    folder = export(Export(run=run.out, out=out))
    with pytest.raises(UserError, match="--overwrite"):
        export(Export(run=run.out, out=out))
    assert export(Export(run=run.out, out=out, overwrite=True)) == folder
    assert export(Export(run=run.out)) == export(Export(run=run.out))  # the run's own copy may be renewed


def test_a_damaged_export_is_refused(tiny: Pretrain) -> None:
    file = export(Export(run=fake_run(tiny, Path(tiny.out)).out)) / "model.safetensors"
    assert open_start(str(file.parent)).weights
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 1
    file.write_bytes(whole)
    with pytest.raises(UserError, match="its checksum is wrong"):
        open_start(str(file.parent))


def test_the_files_have_the_usual_mode_and_a_killed_export_leaves_no_trace(tiny: Pretrain, tmp_path: Path) -> None:
    run, out = fake_run(tiny, Path(tiny.out)), tmp_path / "shared"
    out.mkdir()
    (out / "model.safetensors.part").write_bytes(b"half of it")
    export(Export(run=run.out, out=str(out)))
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (tmp_path / "usual").touch()
    assert (out / "model.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_export_that_cannot_be_written_says_what_would_do(tiny: Pretrain) -> None:
    run = fake_run(tiny, Path(tiny.out))
    (Path(run.out) / "export").touch()
    with pytest.raises(CannotWrite, match=r"cannot be written: .* or export to another place with --out FOLDER"):
        export(Export(run=run.out))
