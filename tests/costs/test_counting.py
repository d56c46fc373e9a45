"""The cost of a step, counted on fake tensors, against hand counts and against real allocations."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.data import Normalise
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.mim import MIM
from leanmim.recipes import MAE
from leanmim.step import make_optimizers, update
from tests.costs.small import SMALL


def real_step(config: Pretrain) -> tuple[Callable[[Callable | None], None], MIM]:
    """One real step, with the optimizer's state already there."""
    model = build(config).train()
    model.autocast = torch.bfloat16 if config.precision == "bf16" else None
    optimizers = make_optimizers(model, config)
    c = config.channels
    normalise = Normalise([0.5] * c, [0.5] * c, torch.device("cpu"))
    images = torch.randint(0, 255, (int(config.batch_size), c, *config.size), dtype=torch.uint8)
    images = images if c == 3 else images.float()  # of stored values

    def batches() -> Iterator[Tensor]:
        for _ in range(config.accum):
            read = images.clone()
            yield normalise(read)

    def step(losses: Callable | None = None) -> None:
        update(losses or model, optimizers, batches(), config.accum, config.clip_grad)

    step()
    return step, model


def allocated_peak(step: Callable[[], None]) -> int:
    """Bytes above the start at the peak, by every allocation and release of torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak


def saved_on_real_tensors(step: Callable, model: MIM) -> int:
    """Bytes that autograd holds when the forward pass ends, each storage once, weights aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    most = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def losses(images: Tensor) -> Iterator[Tensor]:
        nonlocal most
        for loss in model(images):
            most = max(most, sum(sizes.values()))
            yield loss
            sizes.clear()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(losses)
    return most


@pytest.mark.parametrize(("accum", "precision"), [(1, "fp32"), (2, "fp32"), (1, "bf16")])
@pytest.mark.parametrize("name", SMALL)
def test_prediction_is_what_is_allocated(name: str, accum: int, precision: str) -> None:
    config = replace(SMALL[name], batch_size=4, accum=accum, precision=precision)
    cost, _ = count(config)
    step, model = real_step(config)
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    assert cost.weight_bytes == weights
    assert cost.peak_bytes == pytest.approx(weights + cost.optimizer_bytes + allocated_peak(step), rel=0.1)
    assert cost.saved_bytes == pytest.approx(saved_on_real_tensors(step, model), rel=0.03)


def test_prediction_for_twelve_channels_of_stored_values() -> None:
    """Large batches of a small model: the images themselves are most of the memory."""
    config = replace(
        SMALL["simmim-vit"], channels=12, model_kwargs={"depth": 1, "embed_dim": 24}, batch_size=32, precision="fp32"
    )
    cost, _ = count(config)
    step, model = real_step(config)
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    assert cost.peak_bytes == pytest.approx(weights + cost.optimizer_bytes + allocated_peak(step), rel=0.05)
    assert cost.saved_bytes == pytest.approx(saved_on_real_tensors(step, model), rel=0.03)


def test_weights_gradients_and_state_are_what_adamw_needs() -> None:
    config = replace(SMALL["mae-vit"], batch_size=2, precision="fp32")
    cost, _ = count(config)
    model = build(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = sum(p.requires_grad for p in model.parameters())
    assert cost.encoder_parameters + cost.decoder_parameters == sum(p.numel() for p in model.parameters())
    assert cost.gradient_bytes == 4 * trained
    assert cost.optimizer_bytes == 8 * trained + 4 * tensors  # two moments, and a step count each
    assert cost.peak_bytes > cost.weight_bytes + cost.optimizer_bytes + cost.saved_bytes


def test_bytes_grow_with_the_batch_and_flops_do_not() -> None:
    one, two = (count(replace(SMALL["mae-vit"], batch_size=size, precision="fp32"))[0] for size in (4, 8))
    assert one.train_flops_per_image == two.train_flops_per_image
    assert two.saved_bytes == pytest.approx(2 * one.saved_bytes, rel=0.01)
    assert one.weight_bytes == two.weight_bytes


def test_a_huge_model_takes_no_memory_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    cost, _ = count(replace(MAE, model="vit_huge_patch14_224", batch_size=256, precision="bf16"), "cuda")
    assert cost.peak_bytes > 40 * 2**30
    assert torch.equal(torch.get_rng_state(), state)


def test_counting_does_not_disturb_training(tiny: Pretrain) -> None:
    """Position tables are cached; none may stay fake."""
    count(tiny)
    torch.manual_seed(0)
    (loss,) = build(tiny).losses(torch.randn(2, 3, 32, 32))
    loss.backward()
    assert type(loss) is Tensor
    assert loss.isfinite()


def test_a_batch_that_is_to_be_chosen_cannot_be_counted() -> None:
    with pytest.raises(UserError, match="--batch-size auto; give a number"):
        count(replace(MAE, batch_size="auto"))
