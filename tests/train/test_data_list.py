"""Images that were renamed, added, removed or replaced since a run began."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.classifier.finetune import finetune
from leanmim.config import Finetune, Pretrain
from leanmim.errors import UserError
from leanmim.processes import ALONE, Process
from leanmim.run import Run, load
from leanmim.train.data_list import DataList, check_alike, check_unchanged, compared, read_list
from leanmim.train.pretrain import pretrain
from tests.helpers import equal
from tests.runs import contents, lines, noisy_tiles, pretrain_until, untrained, weights


@pytest.fixture
def begun(tiny: Pretrain, photos: Path, tmp_path: Path) -> Pretrain:
    """A run of its own 16 photos, stopped after 3 of 8 steps."""
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    config = replace(tiny, data=str(data), blr=0.01)
    pretrain_until(config, 3)
    return config


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ("a b c d", r"1 added: d\nPut them back"),
        ("b c", r"1 removed: a\nPut"),
        ("a b d", r"1 added: d\n  1 removed: c\nPut"),
        ("a b c d e f g", r"4 added: d, e, f, \.\.\.\nPut"),
        ("a c b", r"the same names in another order\nPut.*--data-changed accept"),
    ],
)
def test_images_that_came_or_went_are_counted_and_named(now: str, told: str) -> None:
    before, after = (DataList(names.split(), [None] * len(names.split()), 3, 1) for names in ("a b c", now))
    assert check_unchanged(before, before, "refuse") is None
    assert check_unchanged(None, before, "refuse") is None
    with pytest.raises(UserError, match=told):
        check_unchanged(before, after, "refuse")
    assert check_unchanged(before, after, "accept") == compared(before, after)


def rename(data: Path) -> None:
    (data / "cat.jpg").rename(data / "tac.jpg")


def add(data: Path) -> None:
    shutil.copy(data / "cat.jpg", data / "zebra.jpg")


def remove(data: Path) -> None:
    (data / "cat.jpg").unlink()


def cut_off(data: Path) -> None:
    (data / "cat.jpg").write_bytes((data / "cat.jpg").read_bytes()[:-10])


def exchange(data: Path) -> None:
    shutil.copy(data / "sheep.jpg", data / "cat.jpg")


def lose_most(data: Path) -> None:
    for photo in sorted(data.glob("*.jpg"))[3:]:
        photo.unlink()


def move_down(data: Path) -> None:
    (data / "deep").mkdir()
    (data / "cat.jpg").rename(data / "deep" / "cat.jpg")


CHANGES = {
    rename: r"1 added: tac\.jpg\n  1 removed: cat\.jpg",
    add: r"1 added: zebra\.jpg",
    remove: r"1 removed: cat\.jpg",
    cut_off: r"1 of another size: cat\.jpg",
    exchange: r"1 of another size: cat\.jpg",
    lose_most: r"13 removed: .*, \.\.\.",
    move_down: r"1 added: deep/cat\.jpg\n  1 removed: cat\.jpg",
}


def test_whatever_changes_is_refused_and_nothing_is_written(begun: Pretrain, photos: Path, tmp_path: Path) -> None:
    before = contents(Path(begun.out))
    for change, told in CHANGES.items():
        data = tmp_path / change.__name__
        shutil.copytree(photos, data)
        change(data)
        with pytest.raises(
            UserError, match=f"that the run began with:\n  {told}\nPut them back, or give --data-changed"
        ):
            pretrain(replace(begun, data=str(data)))
    assert contents(Path(begun.out)) == before


@pytest.mark.results
@pytest.mark.parametrize("change", [add, lose_most])
def test_accepted_images_leave_steps_and_learning_rates(
    begun: Pretrain, change, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where fewer are left than a step takes; the run is then one of the new images."""
    whole = replace(begun, out=str(tmp_path / "whole"))
    pretrain(whole)
    change(Path(begun.data))
    accepting = replace(begun, data_changed="accept")
    pretrain(accepting)
    assert "not those that the run began with, as accepted:" in capsys.readouterr().out
    assert [(line["step"], line["lr"], line["epoch"]) for line in lines(begun)] == [
        (line["step"], line["lr"], line["epoch"]) for line in lines(whole)
    ]
    assert not equal(weights(begun), weights(whole))
    run = Run(Path(begun.out))
    (noted,) = [json.loads(line) for line in run.changes.read_text().splitlines()]
    kinds = (noted["added"], noted["removed"], noted["changed"])
    assert (noted["step"], *kinds) == ((3, 1, 0, 0) if change is add else (3, 0, 13, 0))
    assert "Changed while training" in (run.folder / "report.html").read_text()

    pretrain(begun)  # which has ended, and knows these images now
    assert len(run.changes.read_text().splitlines()) == 1


def test_a_finished_run_is_not_trained_on_whatever_happened_to_the_images(
    begun: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(begun)
    before = weights(begun)
    add(Path(begun.data))
    pretrain(begun)
    assert "finished after step 8" in capsys.readouterr().out
    assert equal(weights(begun), before)
    with pytest.raises(UserError, match=r"1 added: zebra\.jpg"):
        pretrain(replace(begun, epochs=3))


def test_a_list_of_names_only_and_a_damaged_one(begun: Pretrain) -> None:
    """The former is an earlier version's."""
    run = Run(Path(begun.out))
    kept = json.loads(run.names.read_text())
    run.names.write_text(json.dumps(kept["names"][1:]))
    with pytest.raises(UserError, match=r"1 added: "):
        pretrain(begun)
    for torn in ('["a.jpg", ', '{"names": ["a"]}', '{"names": ["a"], "sizes": [], "images": 1, "processes": 1}'):
        run.names.write_text(torn)
        with pytest.raises(UserError, match=r"names\.json'.*is damaged .*or remove it"):
            pretrain(begun)
    run.names.write_text(json.dumps(kept["names"]))
    pretrain(begun)
    assert json.loads(run.names.read_text()) == kept


def test_processes_that_see_other_images_are_named() -> None:
    class Three(Process):
        def gather(self, value: object) -> list:
            return [value, "other", value]

    check_alike(ALONE, "digest", "images in --data")
    with pytest.raises(UserError, match=r"not all 3 processes see the same images in --data: other .* does rank 1;"):
        check_alike(Three(0, 3), "digest", "images in --data")


def test_fine_tuning_goes_on_with_other_images_but_not_with_other_classes(tiny: Pretrain, tmp_path: Path) -> None:
    data = noisy_tiles(tmp_path / "tiles", 8, 4, (40, 32))
    config = Finetune(
        start=str(untrained(tiny)), data=str(data), out=str(tmp_path / "tuned"), epochs=1, batch_size=8, device="cpu",
        workers=0, log_every=1,
    )  # fmt: skip
    run = Run(finetune(config))
    for name in ("red/0.png", "green/1.png"):
        (data / "train" / name).write_bytes((data / "train" / "blue" / "0.png").read_bytes() + b" ")
    (data / "train" / "blue" / "7.png").unlink()
    with pytest.raises(UserError, match=r"1 removed: train/blue/7\.png\n  2 of another size: train/green/1\.png, "):
        finetune(config)
    finetune(replace(config, data_changed="accept"))
    assert load(run.last)["step"] == 3
    assert json.loads(run.changes.read_text())["changed"] == 2
    assert read_list(run, ALONE).images == 24
    finetune(config)
    (data / "train" / "violet").mkdir()
    (data / "train" / "blue" / "0.png").rename(data / "train" / "violet" / "0.png")
    with pytest.raises(UserError, match="1 classes added: violet"):
        finetune(replace(config, data_changed="accept"))
