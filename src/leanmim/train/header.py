"""What a run says before its first step."""

from collections.abc import Iterator
from typing import Any

from leanmim.auto import few_steps
from leanmim.config import Pretrain
from leanmim.costs import StepCost
from leanmim.files import readable
from leanmim.mim import MIM
from leanmim.placement import offloads, offloads_state
from leanmim.train.phases import PhaseSteps
from leanmim.train.training import Training

COARSE = 3  # squares along a side


def header(
    config: Pretrain, plan: list[PhaseSteps], images: int, predicted: StepCost, training: Training
) -> Iterator[str]:
    """Model, data, schedule, predicted cost, and warnings."""
    device, world, depths = training.device, training.process.replica.world, training.model.encoder.depths
    yield (
        f"{config.recipe}: {config.model}, {predicted.encoder_parameters / 1e6:.1f} M parameters, "
        f"decoder {predicted.decoder_parameters / 1e6:.1f} M, {'bf16' if training.model.autocast else 'fp32'} on {device}"
    )
    yield (
        f"{images} images in {config.data if isinstance(config.data, str) else ', '.join(config.data)}; {plan[-1].stop} steps in {config.epochs:g} epochs; "
        f"warm-up {config.warmup:g} epochs"
    )
    for phase in plan:
        own = phase.config
        yield (
            f"epochs {phase.epoch:g} to {phase.epochs:g}: {own.size[0]} x {own.size[1]} px, {phase.per_epoch} steps each; "
            f"effective batch {phase.images} = {own.batch_size} x accum {own.accum} x {world} processes; "
            f"lr {float(own.blr) * phase.images / 256:.3g} = blr {float(own.blr):.3g} x {phase.images} / 256"
        )
    yield (
        f"predicted: {readable(predicted.peak_bytes)} at the peak, "
        f"{predicted.train_flops_per_image / 1e9:.3g} GFLOP an image"
    )
    if len(depths) > 1:
        yield f"{len(depths)} segments, which end at {', '.join(map(str, depths))}: one loss each"
    if config.pipeline:
        yield shared_segments(predicted, training)
    if config.offload and not (offloads(config, device) or offloads_state(config, device)):
        yield f"nothing to offload: {device.type} has no memory of its own"
    yield from coarse_masks(training.model, config)
    yield from few_steps(plan[-1].stop)


def shared_segments(predicted: StepCost, training: Training) -> str:
    """What each process of a pipeline has, and what that is worth."""
    costs, parts = predicted.segment_flops, training.parts
    if not parts:
        return "pipeline: there is one process, which has all segments; torchrun starts several"
    shares = [sum(costs[i] for i in part) / sum(costs) for part in parts]
    named = [f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts]
    listed = "; ".join(f"{name} ({share:.0%} of the FLOPs)" for name, share in zip(named, shares, strict=True))
    return f"pipeline of {len(parts)} processes with the segments {listed}: {1 / max(shares):.2f} times as fast as one at most"


def coarse_masks(model: MIM, config: Pretrain) -> Iterator[str]:
    """A warning of masks of few squares."""
    grid = model.encoder.grid
    height, width = (side * model.finer // model.mask_unit for side in grid)
    if max(height, width) > COARSE:
        return
    stride, cell = model.encoder.stride, model.target.cell
    side = stride * model.mask_unit // model.finer
    finer = [size for size in range(cell, stride, cell) if stride % size == 0] if config.masking == "pixel" else []
    smaller = [size for size in (*finer, stride) if size < side]
    unit = f"a --mask-unit of {smaller[-1]} px or " if smaller else ""
    yield f"masks are drawn on a grid of only {height} x {width} squares, so there are few different ones: give {unit}a larger --input-size"


def continuing(config: Pretrain, state: dict[str, Any] | None, steps: int) -> Iterator[str]:
    """Where a run goes on, if it does."""
    if not state:
        return
    if state["step"] == steps:
        yield f"finished after step {steps}: more --epochs train on; what a finished run leaves is written again"
        return
    yield f"continuing after step {state['step']}"
    if (before := state["config"]["epochs"]) < float(config.epochs):
        yield (
            f"{config.epochs:g} epochs in place of {before:g}: the schedule ends with the last of them, the learning rate rises "
            "to it from where it is"
        )
