"""One segment on the device: same numbers, less memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leanmim.offload import Offload
from leanmim.run import Run, load
from leanmim.step import update
from leanmim.train.pretrain import pretrain
from tests.helpers import batches_of, equal, images_of, in_segments, made, of_segments, state_of, three_classes


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_offloaded_training_is_the_same_training(autocast: torch.dtype | None) -> None:
    """Copies to the host and back change no bit; what is saved is what would be saved without."""
    config = in_segments()
    model, optimizers = made(config)
    other, others = made(config)
    model.autocast = other.autocast = autocast
    places = {p: p.data_ptr() for p in model.parameters()}
    offload = Offload(model, optimizers, torch.device("cpu"))
    assert all(p.data_ptr() != places[p] for segment in of_segments(optimizers) for p in segment)
    for step in range(3):
        means = update(offload, optimizers, batches_of(config, step, 2), 2, 0.05)
        assert torch.equal(means, update(other, others, batches_of(config, step, 2), 2, 0.05))
        assert offload.present == {0}  # for the next step
        offload.settle()
        assert equal(state_of(model, optimizers), state_of(other, others))
    moments = [value for optimizer in optimizers for value in optimizer.state.values()]
    assert len(moments) == sum(map(len, of_segments(optimizers)))
    assert all(state["step"] == 3 and state["exp_avg"].any() for state in moments)


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
    config = in_segments()
    model, optimizers = made(config)
    segments, here = of_segments(optimizers), set()

    def fetch(x: Tensor) -> Tensor:
        new = x.clone()
        here.add(new.data_ptr())
        return new

    def store(x: Tensor) -> Tensor:
        here.discard(x.data_ptr())
        return x.clone()

    offload = Offload(model, optimizers, torch.device("cpu"), fetch, store)
    seen: list[tuple[int, set[int]]] = []
    hooks = []

    def look(i: int) -> None:
        for j, segment in enumerate(segments):
            assert {p.data_ptr() in here for p in segment} == {j in offload.present}
            held = {value.data_ptr() in here for p in segment for value in optimizers[j].state.get(p, {}).values()}
            assert held <= {j in offload.present}
        seen.append((i, set(offload.present)))

    for i, (block, decoder) in enumerate(zip(model.encoder.backbone.blocks, model.decoders, strict=True)):
        hooks += [module.register_forward_hook(lambda *_, i=i: look(i)) for module in (block, decoder)]
        segments[i][0].register_post_accumulate_grad_hook(lambda _, i=i: look(i))
        optimizers[i].register_step_post_hook(lambda *_, i=i: seen.append((i, set(offload.present))))
    for step in range(2):
        update(offload, optimizers, batches_of(config, step, 1))
    assert [i for i, _ in seen] == [i for i in range(4) for _ in range(4)] * 2
    for k, (i, present) in enumerate(seen):  # block, decoder; backward, step: by then the next one is there
        assert present == ({i} if k % 4 < 2 else {i, (i + 1) % 4})
    assert offload.present == {0} and here

    for hook in hooks:
        hook.remove()
    images = images_of(config)
    with torch.no_grad():
        expected = model.encoder.backbone(images)
        with offload.whole():
            assert all(p.data_ptr() in here for segment in segments for p in segment)
            held = [
                v.data_ptr() in here for o in optimizers[1:] for moments in o.state.values() for v in moments.values()
            ]
            assert held and not any(held)  # evaluating needs no moments
            assert torch.equal(model.encoder.backbone(images), expected)
    assert {p.data_ptr() in here for segment in segments[1:] for p in segment} == {False}
