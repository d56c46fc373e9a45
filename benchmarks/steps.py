"""Real training steps: their time in turns, their memory each in a process of its own."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import record
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.data import Normalise
from leanmim.device import resolve_precision
from leanmim.factory import build
from leanmim.graphed import updating
from leanmim.offload import Offload
from leanmim.offload_state import StateOffload
from leanmim.placed import Placed
from leanmim.placement import OnDevice, offloads, place
from leanmim.recompute import checkpoint_blocks
from leanmim.rooms import inner_tensors
from leanmim.schedule import phases
from leanmim.step import make_optimizers, update
from leanmim.targets import with_levels


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    before = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - before


def ready(config: Pretrain, device: torch.device) -> tuple[Placed, list[AdamW]]:
    """A recipe's model where it trains, and its optimizers with their state, as in any step but the first. A CPU offloads too:
    then the host's memory is that which is not of torch's allocator.
    """
    model = build(config)
    model.autocast = resolve_precision(config.precision, device)
    model.target = with_levels(model.target, config.read_as, [0.5] * config.channels, [0.5] * config.channels)
    if not offloads(config, device):
        model.to(device)
    optimizers = make_optimizers(model, config)
    for optimizer in optimizers:
        for parameter in parameters(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    if config.offload and device.type == "cpu":
        model.train()
        if config.checkpointing:
            checkpoint_blocks(model.encoder, model.decoders)
        if config.cut:
            return Offload(model, optimizers, device), optimizers
        return OnDevice(model, device, state=StateOffload(optimizers, device)), optimizers
    return place(model, optimizers, config, device), optimizers


def parameters(optimizer: AdamW) -> list[Tensor]:
    """Those that it steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def resident(placed: Placed, optimizers: list[AdamW]) -> list[Tensor]:
    """The weights, buffers and optimizer state that are on the device."""
    values = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    moments = [tensor for value in values for tensor in inner_tensors(value)]
    if isinstance(placed, Offload):
        trained = {parameter for optimizer in optimizers for parameter in parameters(optimizer)}
        fixed = [p for p in placed.model.parameters() if p not in trained]
        stay = [] if isinstance(optimizers[0], AdamW) else moments  # of 8 bits; others are in the rooms
        return [*(memory for room in placed.rooms for memory in room), *fixed, *placed.model.buffers(), *stay]
    model: Any = placed.losses
    if isinstance(placed, OnDevice) and placed.state:
        moments = [memory for room in placed.state.rooms for memory in room]
    return [*model.parameters(), *model.buffers(), *moments]


class Timed:
    """A recipe, ready to take steps; one model for each of its phases."""

    def __init__(self, config: Pretrain, device: torch.device) -> None:
        self.device, self.parts, self.updates = device, [], []
        for phase in phases(config):
            placed, optimizers = ready(phase.config, device)
            images = torch.randn(int(config.batch_size), config.channels, *phase.config.size, device=device)
            share = (phase.stop - phase.start) / phases(config)[-1].stop
            self.parts.append(
                (share, placed.losses, optimizers, images, phase.config.clip_grad, phase.config.update_in_backward)
            )
            self.updates.append(updating(phase.config) or update)

    def step(self) -> float:
        """Seconds of a step, on average over the epochs."""
        total = 0.0
        for one_step, (share, losses, optimizers, images, clip, in_backward) in zip(
            self.updates, self.parts, strict=True
        ):
            total += share * seconds(
                lambda: one_step(losses, optimizers, [images], 1, clip, in_backward=in_backward),  # noqa: B023
                self.device,
            )
        return total


def in_turns(configs: list[Pretrain], device: torch.device, rounds: int) -> list[list[float]]:
    """For each round the seconds of every recipe's step, one after the other, so that a slower minute slows all."""
    runs = [Timed(config, device) for config in configs]
    for run in runs:
        run.step()  # warm up
    return [[run.step() for run in runs] for _ in range(rounds)]


def transient(call: Callable[[], object]) -> int:
    """Bytes of torch's CPU allocator at the peak above the start, what kernels take for themselves included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        call()
    found = [(e.start_ns(), e.nbytes()) for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(found, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak


def peak_of(step: Callable[[], object], placed: Placed, optimizers: list[AdamW], device: torch.device) -> int:
    """Bytes allocated on the device at the peak of a step that is not the first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    return sum(tensor.untyped_storage().nbytes() for tensor in resident(placed, optimizers)) + transient(step)


def measure(config: Pretrain, device: torch.device) -> dict[str, int]:
    """Peak, and bytes saved for backward, of one real step, after the optimizer's state is there."""
    cost, _ = count(config, device.type)
    placed, optimizers = ready(config, device)
    normalise = Normalise([0.5] * 3, [0.5] * 3, device)
    images = torch.randint(0, 255, (int(config.batch_size), 3, *config.size), dtype=torch.uint8)
    held: dict[int, int] = {}
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {weight.untyped_storage().data_ptr() for weight in resident(placed, optimizers)}:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def watched(images: Tensor) -> Iterator[Tensor]:
        nonlocal saved
        for loss in placed.losses(images):
            saved = max(saved, sum(held.values()))
            yield loss
            held.clear()

    def batches() -> Iterator[Tensor]:
        for _ in range(config.accum):
            read = images.clone()
            yield normalise(read)

    def step(through: Callable[[Tensor], Iterator[Tensor]]) -> None:
        update(
            through, optimizers, batches(), config.accum, config.clip_grad,
            segment_first=isinstance(placed, Offload), in_backward=config.update_in_backward,
        )  # fmt: skip

    if device.type == "cuda":
        step(placed.losses)
    peak = peak_of(lambda: step(placed.losses), placed, optimizers, device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(watched)
    return {
        "peak": peak, "saved": saved, "predicted_peak": cost.peak_bytes, "predicted_saved": cost.saved_bytes,
    }  # fmt: skip


def measure_each(configs: list[Pretrain], device: torch.device) -> Iterator[dict[str, int]]:
    """`measure` of each, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for config in configs:
            yield pool.apply(measure, (config, device))


def side_by_side(
    name: str,
    title: str,
    recipes: dict[str, Pretrain],
    models: list[str],
    device: torch.device,
    batch: int,
    rounds: int,
) -> None:
    """Write the time and memory of a step of every recipe, as ratios to the first."""
    rows, raw = [], []
    for model in models:
        configs = [replace(recipe, model=model, batch_size=batch) for recipe in recipes.values()]
        memory = list(measure_each(configs, device))
        times = in_turns(configs, device, rounds)
        for i, recipe in enumerate(recipes):
            rows.append({
                "model": model.removesuffix("_224"), "recipe": recipe,
                "step, ms": f"{1e3 * statistics.median(line[i] for line in times):.0f}",
                "ratio": f"{statistics.median(line[i] / line[0] for line in times):.2f}",
                "peak, MiB": f"{memory[i]['peak'] / 2**20:.0f}",
                "ratio ": f"{memory[i]['peak'] / memory[0]['peak']:.2f}",
                "saved, MiB": f"{memory[i]['saved'] / 2**20:.0f}",
                " ratio": f"{memory[i]['saved'] / memory[0]['saved']:.2f}",
            })  # fmt: skip
            raw.append({"model": model, "recipe": recipe, "seconds": [line[i] for line in times], **memory[i]})
            print(rows[-1], flush=True)
    configuration = {
        "device": device.type, "batch": batch, "rounds": rounds, "threads": torch.get_num_threads(), "input": "224 px",
    }  # fmt: skip
    record.write(f"{name}-{device.type}", title, configuration, rows, raw,
                 "Ratios to the first recipe of the same model, medians over rounds; memory of real steps.")  # fmt: skip
