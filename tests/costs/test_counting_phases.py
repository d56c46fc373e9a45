"""The cost of a run whose input size grows."""

from leanmim.config import Pretrain
from leanmim.costs import count, count_phase
from leanmim.schedule import phases
from tests.helpers import growing


def test_the_cost_is_that_of_the_largest_phase_and_the_mean_of_the_flops(tiny: Pretrain) -> None:
    config = growing(tiny)
    cost, flops = count(config)
    first, second = (count_phase(phase.config) for phase in phases(config))
    assert cost.peak_bytes == max(first[0].peak_bytes, second[0].peak_bytes)
    assert flops["training"]["encoder"] == round(
        (first[1]["training"]["encoder"] + second[1]["training"]["encoder"]) / 2
    )
    assert cost.train_flops_per_image == sum(flops["training"].values())
