"""Pictures over training time: when they are drawn, and that they change nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Pretrain
from leanmim.errors import CannotWrite
from leanmim.run import Run
from leanmim.train import strips
from leanmim.train.pretrain import pretrain
from tests.helpers import growing
from tests.runs import contents, lines, pretrain_until, shown, weights


def kept(folder: Path) -> list[tuple[int, bytes]]:
    return [(step, path.read_bytes()) for step, path in Run(folder).strips().items()]


@pytest.mark.results
def test_with_and_without_pictures_training_is_bit_identical(tiny: Pretrain, tmp_path: Path) -> None:
    """And a run that was killed and continued has the pictures of one that was not."""
    config = replace(tiny, epochs=3, show_every="auto")
    folder = pretrain(config)
    without = replace(config, out=str(tmp_path / "without"), show_every=0)
    pretrain(without)
    assert [line["loss"] for line in lines(config)] == [line["loss"] for line in lines(without)]
    assert all(value.equal(weights(without)[name]) for name, value in weights(config).items())
    assert not kept(Path(without.out)) and not (Path(without.out) / "pictures").exists()
    assert [step for step, _ in kept(folder)] == [0, 1, 3, 6, 12]
    assert len({png for _, png in kept(folder)}) == 4  # the learning rate of the first step is 0
    found = shown(folder)
    assert found.keys() == {"reconstructions", "reconstructions_over_time"}
    assert found["reconstructions_over_time"] == kept(folder)
    assert found["reconstructions"] == [(12, (folder / "reconstructions.png").read_bytes())]

    killed = replace(config, out=str(tmp_path / "killed"))
    pretrain_until(killed, 5)
    Run(Path(killed.out)).strip(6).write_bytes(b"of a step after the checkpoint")
    pretrain(killed)
    assert kept(Path(killed.out)) == kept(folder)
    assert shown(Path(killed.out)) == {**found, "reconstructions": shown(Path(killed.out))["reconstructions"]}
    before = contents(folder / "pictures")
    pretrain(config)  # finished: nothing is drawn over
    assert contents(folder / "pictures") == before and shown(folder)["reconstructions_over_time"] == kept(folder)
    pretrain(replace(config, overwrite=True, seed=1, show_every=0))
    assert not kept(folder)


def test_every_so_many_epochs_and_in_every_phase_at_its_size(tiny: Pretrain) -> None:
    config = growing(tiny, show_every=2)
    folder = pretrain(config)
    steps = {line["step"]: line["epoch"] for line in lines(config) if "epoch" in line}
    assert [steps.get(step, 0) for step in Run(folder).strips()] == [0, 2, 4]


def test_a_full_disk_costs_pictures_only(
    tiny: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> bool:
        raise CannotWrite("'step.png' cannot be written: no room")

    monkeypatch.setattr(strips, "write_strip", full)
    pretrain(replace(tiny, epochs=1, show_every="auto"))
    assert capsys.readouterr().out.count("no room. Training goes on, and tries again to write the picture") == 1
    assert len(lines(tiny)) == 4


@pytest.mark.results
def test_a_damaged_picture_does_not_end_a_run_and_an_old_one_is_not_the_next_runs(tiny: Pretrain) -> None:
    config = replace(tiny, epochs=1, show_every="auto")
    folder = pretrain(config)
    Run(folder).strip(1).write_bytes(b"\x89PNG")
    (folder / "features.png").write_bytes(b"of this run")
    assert pretrain(replace(config, epochs=2)) == folder and len(lines(config)) == 8
    assert [step for step, _ in shown(folder)["reconstructions_over_time"]] == [0, 2, 4, 8]
    assert "cannot be read as pre-training wrote it" in (folder / "report.html").read_text()
    assert (folder / "features.png").exists()
    pretrain(replace(config, seed=1, overwrite=True))
    assert not (folder / "features.png").exists()


def test_pictures_take_no_time_of_training(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    paused = strips.Loop.paused

    @contextmanager
    def noted(loop: strips.Loop) -> Iterator[None]:
        entered.append(loop.done)
        with paused(loop):
            yield

    monkeypatch.setattr(strips.Loop, "paused", noted)
    pretrain(replace(tiny, epochs=1, show_every="auto"))
    assert entered == [0, 1, 2, 4]
