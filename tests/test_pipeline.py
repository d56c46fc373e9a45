"""Segments in several processes train as in one."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmim.costs import StepCost
from leanmim.data import seed_of
from leanmim.errors import UserError
from leanmim.mim import MIM, Part
from leanmim.pipeline import balanced, speed_up
from leanmim.recipes import LEAN_MEMORY, MAE
from leanmim.run import Run, load
from leanmim.train import pretrain as pretraining
from tests.helpers import equal, in_segments
from tests.process_faults import Fault, together
from tests.runs import arguments, lines, pretrain_until, weights

NAMES = {
    "title": "bim",
    "recipe": "bim",
    "model": "vit",
    "segment_flops": (3, 2, 1, 1),
    "segment_parameters": (1, 1, 1, 1),
    "allocator": "",
    "input_sizes": ((224, 224),),
}
COST = StepCost(**{field.name: 1 for field in fields(StepCost)} | NAMES)


@pytest.mark.parametrize("seed", range(5))
def test_the_most_expensive_part_costs_as_little_as_possible(seed: int) -> None:
    costs = torch.randint(0, 20, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
    for count in range(1, 8):
        parts = balanced(costs, count)
        assert [i for part in parts for i in part] == list(range(7)) and all(parts) and len(parts) == count
        least = min(
            max(sum(costs[a:b]) for a, b in pairwise((0, *cuts, 7))) for cuts in combinations(range(1, 7), count - 1)
        )
        assert max(sum(costs[i] for i in part) for part in parts) == least
        assert speed_up(costs, count) == sum(costs) / least


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match=r"--pipeline: 4 segments cannot be shared among 5 processes; start 4 at most"):
        balanced([1] * 4, 5)
    with pytest.raises(
        UserError, match=r"--pipeline shares the segments .* end to end is one segment; give --segments"
    ):
        replace(MAE, pipeline=True).check()
    with pytest.raises(UserError, match=r"--offload only one of them; give --no-offload"):
        replace(LEAN_MEMORY, pipeline=True).check()


whole = MIM.losses


def broken(self: MIM, images: Tensor, masks: Any = None, part: Part | None = None) -> Iterator[Tensor]:
    """In the third step's second batch the loss of segment 2 is not a number."""
    bad = torch.initial_seed() == seed_of(0, 0, 2, 1)
    for i, loss in enumerate(whole(self, images, masks, part=part), part.segments.start if part else 0):
        yield loss * (math.nan if bad and i == 2 else 1)


def prepare() -> None:
    """In a process: what a step costs is known, and a loss is broken."""
    pretraining.count = lambda *_: (COST, {})  # type: ignore[assignment]
    MIM.losses = broken  # type: ignore[method-assign]


def test_killed_and_continued_by_others_the_weights_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes until the second one is killed, then three, one of which has two of the four segments, until a signal comes to the
    first. Masks that grow, patches that are thrown at random, dropout, accumulation, clipping and a step that one segment
    skips are as in one process. By the clock a checkpoint is always due: it comes as soon as the pipeline is empty.
    """
    config = replace(
        in_segments(masking="token", throw=0.25, select="random", accum=2, batch_size=2, effective_batch=4, clip_grad=1.0, blr=0.1),
        out=str(tmp_path / "one"), epochs=3, show_every=0, precision="fp32", threads=1, channels_last=False,
    )  # fmt: skip
    config = replace(config, model_kwargs={**config.model_kwargs, "drop_path_rate": 0.2, "proj_drop_rate": 0.1})
    shared = replace(config, out=str(tmp_path / "shared"), pipeline=True, checkpoint_minutes=1e-9)
    one, same = Run(Path(config.out)), Run(Path(shared.out))

    # the second process steps three of the four optimizers, here in the sixth step
    two = together(tmp_path, arguments(shared), 2, [Fault("killed", 1, 17)], first=prepare)
    assert two.codes == [2, -9] and "rank 1 of 2 processes" in two.texts[0], two.texts
    assert "pipeline of 2 processes with the segments 0 (43% of the FLOPs); 1 to 3 (57%" in two.texts[0]
    assert load(same.last)["step"] == 5
    # the first process is here in its fourth step, the ninth of all; the two that it has begun meanwhile are done as well
    three = together(tmp_path, arguments(shared), 3, [Fault("asked_to_stop", 0, 4)], first=prepare)
    assert three.codes == [128 + 15] * 3, three.texts
    assert "continuing after step 5" in three.texts[0] and "after step 11, with a checkpoint" in three.texts[2]

    monkeypatch.setattr(pretraining, "count", lambda *_: (COST, {}))
    monkeypatch.setattr(MIM, "losses", broken)
    monkeypatch.setattr(MIM, "forward", broken)
    pretrain_until(config, 11)
    states = [load(run.last) for run in (one, same)]
    assert all(equal(states[0][key], states[1][key]) for key in ("step", "model", "optimizers"))
    assert one.bad_steps.read_text() == same.bad_steps.read_text() != ""
    keys = ("step", "epoch", "lr", "bad_steps", "loss", *(f"loss_{i}" for i in range(4)))
    logs = [[[line.get(key) for key in keys] for line in lines(of)] for of in (config, shared)]
    assert logs[0] == logs[1] and len(logs[0]) == 11 and None in logs[0][2]


def test_each_parameter_may_step_in_the_backward_pass(tmp_path: Path) -> None:
    """No gradient is averaged in a pipeline, so none has to wait."""
    config = replace(
        in_segments(batch_size=4, effective_batch=4, blr=0.1, segments=2, mask_ratio=0.5),
        out=str(tmp_path / "one"), epochs=1, show_every=0, precision="fp32", threads=1, channels_last=False,
    )  # fmt: skip
    shared = replace(config, out=str(tmp_path / "shared"), pipeline=True, update_in_backward=True)
    done = together(tmp_path, arguments(shared), 2)
    assert done.codes == [0, 0], done.texts
    pretraining.pretrain(config)
    assert equal(weights(config), weights(shared))
