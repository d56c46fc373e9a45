"""The optimizer's state in host memory, end to end: same numbers, the moments of two parameters on the device, copies in order."""

from copy import deepcopy

import pytest
import torch
from torch.optim import AdamW

from leanmim.config import Pretrain
from leanmim.offload_state import StateOffload
from leanmim.placement import offloads, offloads_state
from leanmim.rooms import inner_tensors
from leanmim.step import align_state, load_state, update
from tests.helpers import batches_of, equal, in_segments, made, small, state_of
from tests.streams import HappensBefore, Race

CPU = torch.device("cpu")


def here(offload: StateOffload, optimizers: list[AdamW]) -> list[int]:
    """Which parameters' moments are on the device; all others are in memory that the host keeps for them."""
    rooms = [room[1] for room in offload.rooms]
    kept = [host.memory[1] for host in offload.hosts]
    found = []
    for parameter, i in offload.number.items():
        moments = [
            x
            for own in optimizers
            for value in own.state[parameter].values()
            if value.ndim
            for x in inner_tensors(value)
        ]
        inside = [[m.data_ptr() <= x.data_ptr() < m.data_ptr() + m.nbytes for x in moments] for m in (*rooms, kept[i])]
        assert all(sum(one) == 1 for one in zip(*inside, strict=True))
        if not all(inside[2]):
            assert not any(inside[2])
            found.append(i)
    return found


@pytest.mark.parametrize("in_backward", [False, True])
def test_training_is_the_same_and_few_moments_are_on_the_device(in_backward: bool) -> None:
    config = small()
    model, optimizers = made(config)
    other, others = made(config)
    offload = StateOffload(optimizers, CPU)
    rooms = [room[1].nbytes for room in offload.rooms]
    assert rooms == [max(-(-p.nbytes // 512) * 512 * 2 for p in offload.number)] * 2
    for step in range(3):
        accum, clip = (1, 0.0) if in_backward else (2, 0.05)
        means = update(model, optimizers, batches_of(config, step, accum), accum, clip, in_backward=in_backward)
        assert torch.equal(means, update(other, others, batches_of(config, step, accum), accum, clip))
        if step:
            assert len(here(offload, optimizers)) == 2 and offload.after[offload.last] in offload.present
        assert equal(state_of(model, optimizers), state_of(other, others))
    offload.settle()
    assert not here(offload, optimizers)
    assert equal(state_of(model, optimizers), state_of(other, others))
    own = [value for state in optimizers[0].state.values() for value in state.values()]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in own)  # and a checkpoint holds no more


@pytest.mark.parametrize("placed_first", [True, False])
def test_it_continues_from_a_checkpoint_with_all_moments_on_the_host(placed_first: bool) -> None:
    """And from moments that there are already, as in a run's next phase."""
    config = small()
    model, optimizers = made(config)
    update(model, optimizers, batches_of(config, 0, 1))
    other, others = made(config)
    if placed_first:
        offload = StateOffload(others, CPU)
        update(other, others, batches_of(config, 1, 1))  # and some are on the device
    other.load_state_dict(model.state_dict())
    load_state(others, [deepcopy(optimizer.state_dict()) for optimizer in optimizers])
    if not placed_first:
        offload = StateOffload(others, CPU)
    assert not here(offload, others)
    for own in (optimizers, others):
        for group in own[0].param_groups:
            group["lr"] = 0.01
    update(model, optimizers, batches_of(config, 1, 1))
    update(other, others, batches_of(config, 1, 1))
    assert equal(state_of(model, optimizers), state_of(other, others))


def test_moments_lie_as_their_parameter_does() -> None:
    """When the model is laid out in another way too."""
    config = small()
    (model, optimizers), (other, others) = made(config), made(config)
    other.to(memory_format=torch.channels_last)
    offload = StateOffload(others, CPU)
    for step, layout in enumerate((torch.channels_last, torch.contiguous_format, torch.channels_last)):
        other.to(memory_format=layout)
        align_state(others)
        update(model, optimizers, batches_of(config, step, 1))
        update(other, others, batches_of(config, step, 1))
        offload.settle()
        assert all(own["exp_avg"].stride() == p.stride() for p, own in others[0].state.items())
    assert any(not p.is_contiguous() for p in other.parameters())
    assert equal(state_of(model, optimizers), state_of(other, others))


def train_watched(streams: HappensBefore) -> None:
    config = small()
    model, optimizers = made(config)
    with streams:
        offload = StateOffload(optimizers, CPU, streams)
        for memory in (*offload.rooms, *(host.memory for host in offload.hosts)):
            for flat in memory:
                streams.watch(flat)
        for step in range(4):
            update(model, optimizers, batches_of(config, step, 1), in_backward=step == 2)  # in another order
        assert streams.waits == 0  # of the host for the device
        offload.settle()
        state = [deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        update(model, optimizers, batches_of(config, 4, 1))
        load_state(optimizers, state)
        update(model, optimizers, batches_of(config, 5, 1))


def test_copies_and_computations_are_in_order() -> None:
    streams = HappensBefore()
    train_watched(streams)
    assert min(streams.outward.clock["outward"], streams.inward.clock["inward"]) > 100


@pytest.mark.parametrize(
    "left_out",
    [("work", "bring"), ("work", "exchange"), ("outward", "exchange"), ("inward", "exchange"), ("outward", "wait")],
)
def test_no_wait_can_be_left_out(left_out: tuple[str, str]) -> None:
    """Moments that have not come; some that leave before they have come, or before their step, when another parameter is next than
    was expected; some that come too early; a checkpoint before copies have ended.
    """
    with pytest.raises(Race):
        train_watched(HappensBefore(left_out))


@pytest.mark.parametrize(
    ("config", "device", "segments", "state"),
    [
        (small(offload=True), "cuda", False, True),
        (in_segments(offload=True), "cuda", True, False),
        (small(offload=True), "cpu", False, False),
        (small(), "cuda", False, False),
    ],
)
def test_what_waits_depends_on_segments(config: Pretrain, device: str, segments: bool, state: bool) -> None:
    config.check()
    assert offloads(config, torch.device(device)) == segments
    assert offloads_state(config, torch.device(device)) == state
