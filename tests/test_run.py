"""The run folder: what may be written to it, and what is said of a foreign or damaged one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leanmim import files
from leanmim import run as module
from leanmim.checkpoint import load
from leanmim.config import Pretrain
from leanmim.errors import CannotWrite, UserError
from leanmim.run import Run
from tests.runs import Refused, arguments, contents, labelled, untrained


def test_starting_afresh_leaves_no_picture_of_the_earlier_run(tiny: Pretrain, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    for name in ("reconstructions.png", "reconstructions-segment0.png", "mine.png"):
        (run.folder / name).touch()
    run.prepare(tiny, 0)
    assert [path.name for path in run.folder.glob("*.png")] == ["mine.png"]


def test_a_run_folder_of_another_configuration(tiny: Pretrain, refused: Refused) -> None:
    before = contents(untrained(tiny))
    message = refused(arguments(replace(tiny, weight_decay=1.0, input_size=(40,))))
    for word in (
        "another configuration",
        "weight_decay: 0.05 there, 1.0 now",
        "input_size: [32] there, [40] now",
        "--overwrite",
    ):
        assert word in message
    assert "epochs" not in message  # only what differs
    assert contents(Path(tiny.out)) == before


@pytest.mark.parametrize("file", ["holiday.jpg", "config.json"])
def test_a_folder_of_somebody_else(file: str, tiny: Pretrain, refused: Refused) -> None:
    """Also with --overwrite."""
    folder = Path(tiny.out)
    folder.mkdir()
    (folder / file).write_text('{"architecture": "resnet18"}')
    for config in (tiny, replace(tiny, overwrite=True)):
        message = refused(arguments(config))
        assert repr(tiny.out) in message
        assert "not a run of leanmim; choose another folder" in message
        assert contents(folder) == {file: b'{"architecture": "resnet18"}'}


def test_out_is_a_file(tiny: Pretrain, refused: Refused) -> None:
    Path(tiny.out).write_text("notes")
    assert "is a file; give a folder" in refused(arguments(tiny))
    assert Path(tiny.out).read_text() == "notes"


def damage(last: Path, how: str) -> None:
    if how == "truncated":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif how == "empty":
        last.write_bytes(b"")
    elif how == "text":
        last.write_text("no checkpoint")
    elif how == "foreign":
        torch.save({"model": {"weight": torch.zeros(3)}}, last)
    else:
        last.unlink()


WRONGS = {
    "truncated": "damaged or not a checkpoint",
    "empty": "damaged or not a checkpoint",
    "text": "damaged or not a checkpoint",
    "foreign": "not one of leanmim",
}


@pytest.mark.parametrize("how", WRONGS)
def test_a_damaged_checkpoint_is_not_continued(how: str, tiny: Pretrain, refused: Refused) -> None:
    folder = untrained(tiny)
    damage(Run(folder).last, how)
    before = contents(folder)
    message = refused(arguments(tiny))
    assert str(Run(folder).last) in message
    assert WRONGS[how] in message
    assert "--overwrite" in message
    assert contents(folder) == before


@pytest.mark.parametrize("how", [*WRONGS, "missing"])
def test_a_damaged_checkpoint_is_not_read(how: str, tiny: Pretrain, tmp_path: Path, refused: Refused) -> None:
    folder, data = untrained(tiny), labelled(tmp_path / "labelled")
    damage(Run(folder).last, how)
    before = contents(folder)
    for line in (["knn", "--data", str(data)], ["probe", "--data", str(data)], ["show"], ["export"]):
        message = refused([line[0], str(folder), *line[1:]])
        assert str(folder) in message
        assert WRONGS.get(how, "no checkpoint yet; let the run go on") in message
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["nowhere", "empty"])
@pytest.mark.parametrize("line", ["knn --data empty", "probe --data empty", "show", "export", "report"])
def test_not_a_run_folder(line: str, name: str, clutter: Path, refused: Refused) -> None:
    before = contents(clutter)
    message = refused([*line.split(), name])
    if line.startswith(("knn", "probe")):  # which take other encoders too
        assert (
            name in message
            and ("no such file or run folder" if name == "nowhere" else "neither a run folder") in message
        )
    else:
        assert f"{name!r} is not a run folder of `leanmim pretrain`" in message
    assert contents(clutter) == before


def resumable(config: Pretrain, step: int = 3) -> Run:
    """A run folder with a checkpoint of that step, and the one before it."""
    run = Run(untrained(config))
    state = load(run.last)
    for done in (step - 1, step):
        run.save({**state, "step": done}, keep=2)
    return run


@pytest.mark.parametrize("how", [*WRONGS, "missing"])
def test_the_one_before_a_damaged_checkpoint_is_continued_and_told(how: str, tiny: Pretrain) -> None:
    run = resumable(tiny)
    damage(run.last, how)
    if how == "foreign":
        with pytest.raises(UserError, match="not one of leanmim"):
            run.to_resume(tiny)
        return
    state = run.to_resume(tiny)
    assert state and state["step"] == 2
    (note,) = run.notes
    assert str(run.last) in note and note.endswith(
        f"Going on from the one before, {str(run.folder / 'checkpoints' / 'last-1.pt')!r}"
    )
    with pytest.raises(UserError, match=r"or use the one before it, '.*last-1.pt'"):
        run.read()  # other commands say so, and do not take it


def test_a_finished_run_without_its_checkpoint_is_not_wiped(tiny: Pretrain, refused: Refused) -> None:
    run = Run(untrained(tiny))
    run.last.unlink()
    assert run.to_resume(tiny) is None  # it was killed before its first one
    (run.folder / "export").mkdir()
    before = contents(run.folder)
    message = refused(arguments(tiny))
    assert "holds a finished run whose checkpoint" in message and "--overwrite" in message
    assert contents(run.folder) == before
    assert run.to_resume(tiny, overwrite=True) is None


@pytest.mark.parametrize(
    ("name", "again"), [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
)
def test_a_job_that_is_started_again_overwrites_once(
    name: str, again: str, tiny: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(untrained(tiny))
    monkeypatch.setenv(name, "7")
    assert run.to_resume(tiny, overwrite=True) is None  # another run
    state = load(run.last)
    run.prepare(tiny, 0)
    run.save({**state, "step": 1})
    assert run.to_resume(tiny, overwrite=True) is None  # the same command given twice
    monkeypatch.setenv(again, "1")
    assert (run.to_resume(tiny, overwrite=True) or {}).get("step") == 1
    assert run.to_resume(replace(tiny, seed=9), overwrite=True) is None
    monkeypatch.setenv(name, "8")
    assert run.to_resume(tiny, overwrite=True) is None


def test_every_moment_of_making_the_folder_can_be_continued(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each write, and in the middle of it."""
    run, real = Run(Path(tiny.out)), os.fsync
    left = 0

    def killed(file: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.truncate(file, 5)
            os._exit(3)
        real(file)

    ends = []
    for moment in range(1, 9):
        left = moment
        if (child := os.fork()) == 0:
            os.fsync = killed
            with run.locked():
                run.prepare(tiny, 0)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert run.to_resume(tiny) is None
    assert ends[0] == 3 and ends[-1] == 0


@pytest.mark.parametrize("torn", [b"", b"\0\0\0", b'{\n  "'])
def test_a_torn_configuration(torn: bytes, tiny: Pretrain) -> None:
    run = resumable(tiny)
    run.config.write_bytes(torn)
    assert (run.to_resume(tiny) or {}).get("step") == 3  # the checkpoint holds it too
    for file in [*run.last.parent.iterdir(), run.metrics]:
        file.unlink()
    assert run.to_resume(tiny) is None
    run.config.write_bytes(b"[somebody's]")
    with pytest.raises(UserError, match="not a run of leanmim"):
        run.to_resume(tiny)


def test_lines_that_a_crash_garbled_are_left_out(tiny: Pretrain) -> None:
    run = Run(untrained(tiny))
    run.metrics.write_bytes(b'{"step": 1}\n{"step": \xff}\n[1]\n{"step": "2"}\n{"step": 9}\n{"step": 2}\n{"ste')
    run.prepare(tiny, 2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    run.evaluations.write_bytes(b'{"what": 1}\n{"wh')
    files.append_line(run.evaluations, {"what": 2})
    assert files.readable_lines(run.evaluations) == [{"what": 1}, {"what": 2}]


def test_a_second_run_into_the_folder_is_refused(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the first; a kill of that leaves no lock, nor does its reader."""
    run = Run(Path(tiny.out))
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    holding = (
        "import os, sys, time; from pathlib import Path; from leanmim.run import Run\n"
        "with Run(Path(sys.argv[1])).locked():\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holding, run.folder], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        reader = int(first.stdout.readline())
        with (
            pytest.raises(UserError, match=rf"another process trains in --out .* \(number {first.pid} on "),
            run.locked(),
        ):
            pass
        first.kill()
    monkeypatch.undo()  # an earlier filelock frees it with the reader
    os.kill(reader, 9)
    with run.locked():
        assert files.readable_object(run.folder / ".lock.json")["pid"] == os.getpid()
    assert not (run.folder / ".lock.json").exists()


def test_room_for_the_checkpoints_is_looked_for(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = Run(Path(tiny.out)), torch.nn.Linear(1000, 1000, bias=False)
    needed = round(1.2 * 12 * 10**6) * 3
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        if fits:
            run.check_room(model, keep=2)
        else:
            with pytest.raises(CannotWrite, match=r"2 checkpoints and one being written take 41\.2 MiB; make room"):
                run.check_room(model, keep=2)
