"""Segments in several processes train as in one."""

from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.costs import StepCost, count
from leanmim.errors import UserError
from leanmim.pipeline import balanced, speed_up
from leanmim.run import Run, load
from tests.helpers import equal, in_segments
from tests.process_faults import Fault, together
from tests.runs import arguments, lines, pretrain_until


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


def test_fewer_segments_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match=r"--pipeline: 4 segments cannot be shared among 5 processes; start 4 at most"):
        balanced([1] * 4, 5)


def trained_alike(one: Pretrain, other: Pretrain) -> bool:
    """Weights, optimizer state and log, bit for bit."""
    states = [load(Run(Path(config.out)).last) for config in (one, other)]
    keys = [key for key in lines(one)[0] if key.startswith(("step", "epoch", "loss", "lr"))]
    logs = [[[line.get(key) for key in keys] for line in lines(config)] for config in (one, other)]
    return logs[0] == logs[1] and all(equal(states[0][key], states[1][key]) for key in ("step", "model", "optimizers"))


def known(cost: StepCost) -> None:
    """In a process: its steps need not be counted again."""
    from leanmim.train import pretrain

    pretrain.count = lambda *_: (cost, {})  # type: ignore[assignment]


def test_stopped_and_continued_by_others_the_weights_are_those_of_one_process(tmp_path: Path) -> None:
    """Two processes until a signal comes to the second one, then three, one of which has two of the four segments, until one comes to
    the first. Masks that grow, patches that are thrown at random, dropout, accumulation and clipping are as in one process.
    """
    config = replace(
        in_segments(masking="token", throw=0.25, select="random", accum=2, batch_size=2, effective_batch=4, clip_grad=1.0, blr=0.1),
        out=str(tmp_path / "one"), epochs=3, show_every=0, precision="fp32", threads=1, channels_last=False,
    )  # fmt: skip
    config = replace(config, model_kwargs={**config.model_kwargs, "drop_path_rate": 0.2, "proj_drop_rate": 0.1})
    shared = replace(config, out=str(tmp_path / "shared"), pipeline=True)
    first = partial(known, count(config)[0])
    two = together(tmp_path, arguments(shared), faults=[Fault("asked_to_stop", 1, 7)], first=first)
    print(*two.texts, sep="\n-----\n")
    assert two.codes == [128 + 15] * 2
    assert load(Run(Path(shared.out)).last)["step"] == 5
    three = together(tmp_path, arguments(shared), 3, [Fault("asked_to_stop", 0, 3)], first=first)
    print(*three.texts, sep="\n-----\n")
    assert three.codes == [128 + 15] * 3
    step = load(Run(Path(shared.out)).last)["step"]
    pretrain_until(config, step)
    assert trained_alike(config, shared)
