"""A run that is continued by another number of processes: the same images a step, or a refusal that names what works."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Pretrain
from leanmim.data import Folder, batches
from leanmim.errors import UserError
from leanmim.processes import Process
from leanmim.run import Run, load
from leanmim.train.phases import plan_phases
from leanmim.train.pretrain import pretrain
from leanmim.train.right_size import shared_batch, split
from tests.helpers import growing
from tests.process_faults import steps, together
from tests.runs import arguments, pretrain_until

TWO = Process(0, 2)


def begun(config: Pretrain, processes: int = 1) -> Pretrain:
    return replace(config, effective_batch=int(config.batch_size) * config.accum * processes)


@pytest.mark.parametrize(
    ("batch", "images", "found"), [(4, 8, (4, 2)), (4, 4, (4, 1)), (4, 2, (2, 1)), (4, 6, (3, 2)), (4, 7, (1, 7))]
)
def test_a_batch_stays_where_accumulation_makes_up_for_it(batch: int, images: int, found: tuple[int, int]) -> None:
    assert shared_batch(batch, images) == found


def test_as_many_processes_as_it_began_with_change_nothing(tiny: Pretrain) -> None:
    assert split(begun(tiny, 2), TWO) == (begun(tiny, 2), [])


@pytest.mark.parametrize(("accum", "processes", "world"), [(1, 1, 2), (2, 1, 2), (1, 2, 1), (1, 3, 4), (3, 2, 8)])
def test_a_step_has_the_same_images(tiny: Pretrain, accum: int, processes: int, world: int) -> None:
    config = replace(begun(replace(tiny, accum=accum), processes), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    source = Folder(config.data, 3)

    def images(config: Pretrain, world: int, step: int) -> list[bytes]:
        of_all = [batches(config, source, step, step + 1, Process(rank, world), per_epoch=2) for rank in range(world)]
        return sorted(image.numpy().tobytes() for feed in of_all for batch, _ in feed for image in batch)

    own, (note,) = split(config, Process(0, world))
    assert f"processes: {world} in place of the {processes} that the run began with" in note
    for step in (0, 3):
        assert images(own, world, step) == images(config, processes, step)


def test_every_phase_is_split(tiny: Pretrain) -> None:
    config = begun(growing(tiny, epochs=4))
    own, _ = split(config, TWO)
    assert (own.batch_size, own.phase_batches, own.phase_accums) == (4, (4, 4), (1, 1))
    one, two = (plan_phases(of, 16, world) for of, world in ((config, 1), (own, 2)))
    assert [(p.start, p.stop, p.images) for p in one] == [(p.start, p.stop, p.images) for p in two]
    with pytest.raises(UserError, match=r"8 images a step, which do not divide among 3; .* with 1, 2, 4, 8 processes"):
        split(config, Process(0, 3))


def test_one_two_and_again_one(tiny: Pretrain, tmp_path: Path) -> None:
    """Steps, learning rates and the configuration are those of the run that one process ended; three are refused."""
    config = replace(tiny, epochs=3, blr=0.01, accum=2, checkpoint_minutes=0.0)
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    pretrain_until(config, 2)
    words = arguments(config)
    three = together(tmp_path, words, 3)
    assert three.codes == [2, 2, 2]
    assert "8 images a step, which do not divide among 3; continue it with 1, 2, 4, 8 processes" in three.texts[0]
    two = together(tmp_path, words, 2)
    assert two.codes == [0, 0], two.texts
    assert "2 in place of the 1 that the run began with; batch 4 x accum 1 in place of 4 x 2" in two.texts[0]
    pretrain(config)
    assert steps(Path(config.out)) == steps(Path(whole.out))
    states = [load(Run(Path(of.out)).last) for of in (config, whole)]
    assert states[0]["config"] | {"out": ""} == states[1]["config"] | {"out": ""}
    assert json.loads(Run(Path(config.out)).names.read_text())["processes"] == 1
