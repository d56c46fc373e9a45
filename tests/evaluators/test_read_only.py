"""A run in a place that cannot be written to: the result is printed all the same."""

from pathlib import Path

import pytest

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.run import Run
from tests.runs import labelled, untrained


@pytest.mark.parametrize("command", ["knn", "probe"])
def test_the_result_is_printed(
    command: str, tiny: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = Run(untrained(tiny)), labelled(tmp_path / "labelled", 6)
    run.evaluations.mkdir()  # permissions do not stop root
    (run.folder / "cache").touch()
    main([command, str(run.folder), "--data", str(data), "--device", "cpu", "--workers", "0"])
    out, err = capsys.readouterr()
    assert out.startswith("pretrained: ")
    (told,) = [line for line in err.splitlines() if line.startswith("leanmim: ")]
    assert told.startswith(f"leanmim: pretrained's {command} is not recorded in {str(run.folder)!r}: ")
