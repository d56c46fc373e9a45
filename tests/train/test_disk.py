"""A limit on the size of files, as of a quota, in a process of its own."""

import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.run import Run, load
from tests.runs import ENVIRONMENT, arguments, command, lines


@pytest.mark.results
def test_a_checkpoint_that_is_too_large_ends_the_run_and_with_room_the_same_command_continues(tiny: Pretrain) -> None:
    """Until the last step it trains on."""
    config = replace(tiny, epochs=1)
    done = subprocess.run(
        command(config), env=ENVIRONMENT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "last.pt' cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Training goes on, and tries again to write the checkpoint" in done.stdout
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4]
    run = Run(Path(config.out))
    assert not list(run.last.parent.iterdir())
    main(arguments(config))
    assert load(run.last)["step"] == 4
    assert (run.folder / "export").exists()
