"""The Slurm script of the examples: a signal, a checkpoint, back into the queue."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.run import Run, load
from leanmim.train import training
from tests.runs import arguments

SCRIPT = Path(__file__).parent.parent / "examples" / "slurm.sh"
TASK = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > task; exit {code}'


def submitted(folder: Path, code: int) -> subprocess.CompletedProcess:
    """The script as Slurm runs it, where a task of leanmim ends with this code."""
    commands = {
        "srun": 'SLURM_PROCID=5 SLURM_LOCALID=1 exec "$@"',
        "scontrol": '[ "$1" = show ] && printf "first\\nsecond\\n" || echo "$*" > requeued',
        "leanmim": TASK.format(code=code),
    }
    folder.mkdir()
    for name, lines in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    own = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    words = ["bash", str(SCRIPT), "pretrain", "mae", "--data", "my photos"]
    return subprocess.run(words, cwd=folder, env=os.environ | own, capture_output=True, text=True)


def test_a_warning_signal_ends_in_a_checkpoint_and_a_code_that_requeues(
    tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, update = replace(tiny, epochs=50), training.update

    def warned(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return update(*given, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(training, "update", warned)
        main(arguments(config))
    assert end.value.code == 128 + signal.SIGUSR1
    assert load(Run(Path(config.out)).last)["step"] == 1

    done = submitted(tmp_path / "job", 128 + signal.SIGUSR1)
    assert done.returncode == 128 + signal.SIGUSR1 and done.stderr == ""
    assert (tmp_path / "job" / "requeued").read_text() == "requeue 123\n"
    assert (tmp_path / "job" / "task").read_text() == "5 1 8 4 first 20123 pretrain mae --data my photos\n"


@pytest.mark.parametrize(
    ("code", "requeued"), [(128 + signal.SIGTERM, True), (0, False), (2, False), (128 + signal.SIGINT, False)]
)
def test_what_goes_back_into_the_queue(code: int, requeued: bool, tmp_path: Path) -> None:
    assert submitted(tmp_path / "job", code).returncode == code
    assert (tmp_path / "job" / "requeued").exists() == requeued
