"""Where an export is written."""

from pathlib import Path

import pytest

from leanmim.config import Export, Pretrain
from leanmim.errors import UserError
from leanmim.formats import export
from tests.helpers import fake_run


def test_an_export_elsewhere_is_not_overwritten_unasked(tiny: Pretrain, tmp_path: Path) -> None:
    run, out = fake_run(tiny, Path(tiny.out)), str(tmp_path / "shared")
    folder = export(Export(run=run.out, out=out))
    with pytest.raises(UserError, match="--overwrite"):
        export(Export(run=run.out, out=out))
    assert export(Export(run=run.out, out=out, overwrite=True)) == folder
    assert export(Export(run=run.out)) == export(Export(run=run.out))  # the run's own copy may be renewed
