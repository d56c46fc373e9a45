"""The run folder: what may be written to it, and what is said of a foreign or damaged one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.errors import UserError
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
    message = refused(arguments(replace(tiny, blr=1.0, input_size=(40,))))
    for word in (
        "another configuration",
        "blr: 0.00015 there, 1.0 now",
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


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ("a b c d", r"1 added: d\nPut them back"),
        ("b c", r"1 removed: a\nPut"),
        ("a b d", r"1 added: d\n  1 removed: c\nPut"),
        ("a b c d e f g", r"4 added: d, e, f, \.\.\.\nPut"),
        ("a c b", r"the same names in another order\nPut"),
    ],
)
def test_images_that_came_or_went_are_counted_and_named(now: str, told: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_names(["a", "b", "c"])
    run.check_names(["a", "b", "c"])
    with pytest.raises(UserError, match=told):
        run.check_names(now.split())
    run.write_names(now.split())  # those that the run began with are kept
    run.check_names(["a", "b", "c"])
