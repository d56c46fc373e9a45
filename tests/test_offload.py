"""One segment on the device: same numbers, less memory, and copies in order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from leanmim.mim import MIM
from leanmim.offload import Offload
from leanmim.run import Run, load
from leanmim.step import load_state, update
from leanmim.train.pretrain import pretrain
from tests.helpers import PLAIN, equal, images_of, in_segments, made, of_segments, state_of, three_classes
from tests.streams import HappensBefore, Race

CPU = torch.device("cpu")
DROPPING = in_segments(model_kwargs={**PLAIN, "proj_drop_rate": 0.2})  # so that each batch draws in every segment


def stepped(losses: MIM | Offload, optimizers: list[AdamW], step: int, accum: int = 2, spoilt: bool = False) -> Tensor:
    """The losses of a step, as training takes it."""
    seeds = [100 * step + micro for micro in range(accum)]
    images = [images_of(DROPPING, seed=seed) for seed in seeds]
    if spoilt:
        images[0][0, 0, 0, 0] = torch.nan
    return update(losses, optimizers, images, accum, 0.05, seeds, segment_first=isinstance(losses, Offload))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_offloaded_training_is_the_same_training(autocast: torch.dtype | None) -> None:
    """Copies to the host and back change no bit, nor does another order of batches; what is saved is what would be saved
    without, and goes on alike.
    """
    (model, optimizers), (other, others) = made(DROPPING), made(DROPPING)
    model.autocast = other.autocast = autocast
    offload = Offload(model, optimizers, CPU)
    for step, spoilt in enumerate((False, True, False)):
        means = stepped(offload, optimizers, step, 1 + step, spoilt)
        assert equal(means.nan_to_num(-1), stepped(other, others, step, 1 + step, spoilt).nan_to_num(-1))
        assert means.isnan().any() == spoilt and offload.present == {3, 0}  # the first one for the next step
        with offload.whole():
            assert equal(model.state_dict(), other.state_dict())
    offload.settle()
    assert equal(state_of(model, optimizers), state_of(other, others))
    own = [*model.parameters(), *(value for o in optimizers for state in o.state.values() for value in state.values())]
    trained = {id(p) for segment in of_segments(optimizers) for p in segment}
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in own if not x.requires_grad or id(x) in trained)

    load_state(optimizers, [optimizer.state_dict() for optimizer in others])
    assert torch.equal(stepped(offload, optimizers, 7), stepped(other, others, 7))
    offload.settle()
    assert equal(state_of(model, optimizers), state_of(other, others))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_training_on_a_gpu_is_the_same_training(tmp_path: Path) -> None:
    """Streams, events and pinned memory; evaluated and saved on the way."""
    config = in_segments(device="cuda", precision="fp32", accum=2, batch_size=2, knn_data=three_classes(tmp_path / "labelled"), knn_every=1,
                   checkpoint_minutes=0.0)  # fmt: skip
    runs = [replace(config, out=str(tmp_path / str(offload)), offload=offload) for offload in (False, True)]
    for run in runs:
        pretrain(run)
    one, other = (load(Run(Path(run.out)).last) for run in runs)
    assert equal(one["model"], other["model"]) and equal(one["optimizers"], other["optimizers"])


def test_only_a_segment_and_the_next_are_here_while_it_works() -> None:
    model, optimizers = made(DROPPING)
    segments = of_segments(optimizers)
    offload = Offload(model, optimizers, CPU)
    seen: list[int] = []

    def within(x: Tensor, memories: list[tuple[Tensor, ...]]) -> bool:
        return any(m.data_ptr() <= x.data_ptr() < m.data_ptr() + m.nbytes for memory in memories for m in memory)

    def look(i: int) -> None:
        assert offload.present == {i, (i + 1) % 4}
        for j, (optimizer, segment) in enumerate(zip(optimizers, segments, strict=True)):
            own = [*segment, *(value for state in optimizer.state.values() for value in state.values())]
            assert {within(x, offload.rooms) for x in own} == {j in offload.present}
        seen.append(i)

    stepped(offload, optimizers, 0)
    for i, (block, decoder) in enumerate(zip(model.encoder.backbone.blocks, model.decoders, strict=True)):
        for module in (block, decoder):
            module.register_forward_hook(lambda *_, i=i: look(i))
        segments[i][0].register_post_accumulate_grad_hook(lambda _, i=i: look(i))
        optimizers[i].register_step_post_hook(lambda *_, i=i: look(i))
    stepped(offload, optimizers, 1)
    assert seen == [i for i in range(4) for _ in range(2 * 3 + 1)]  # of each batch forward twice and backward, a step


def test_two_segments_stay() -> None:
    model, optimizers = made(in_segments(segments=2, mask_ratio=(0.5, 0.75)))
    offload = Offload(model, optimizers, CPU)
    places = []
    for step in range(2):
        stepped(offload, optimizers, step)
        places.append([p.data_ptr() for p in model.parameters()])
    assert places[0] == places[1] and offload.present == {0, 1}


@pytest.fixture
def train_watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[HappensBefore], None]:
    monkeypatch.setattr("leanmim.rooms.PIECE", 32000)  # bytes: several a segment

    def train(streams: HappensBefore) -> None:
        model, optimizers = made(DROPPING)
        with streams:
            offload = Offload(model, optimizers, CPU, streams)
            for memory in (*offload.rooms, *(host.memory for host in offload.hosts)):
                for flat in memory:
                    streams.watch(flat)
            for step, accum in enumerate((1, 2)):
                stepped(offload, optimizers, step, accum)
            assert streams.waits == 0  # of the host for the device
            with offload.whole():
                model.encoder.backbone(images_of(DROPPING))
            stepped(offload, optimizers, 2, 1)
            offload.settle()
            load_state(optimizers, [optimizer.state_dict() for optimizer in optimizers])
            stepped(offload, optimizers, 3, 1)

    return train


def test_copies_and_computations_are_in_order(train_watched: Callable[[HappensBefore], None]) -> None:
    streams = HappensBefore()
    train_watched(streams)
    assert min(streams.outward.clock["outward"], streams.inward.clock["inward"]) > 50


@pytest.mark.parametrize(
    "left_out",
    [
        ("work", "enter"),
        ("work", "wait"),
        ("outward", "exchange"),
        ("inward", "exchange"),
        ("outward", "wait"),
        ("inward", "wait"),
    ],
)
def test_no_wait_can_be_left_out(left_out: tuple[str, str], train_watched: Callable[[HappensBefore], None]) -> None:
    """Weights that have not come, state that has not come, a segment that leaves before its step, one that comes too early, and
    the whole model before copies have ended, each way.
    """
    with pytest.raises(Race):
        train_watched(HappensBefore(left_out))
