"""Where a model trains: on one device, in several processes that share images, segments or the model itself, or one segment at a
time on the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from leanmim.config import Pretrain
from leanmim.mim import MIM
from leanmim.offload import Offload
from leanmim.offload_state import StateOffload
from leanmim.pipeline import Pipeline
from leanmim.placed import Placed
from leanmim.processes import ALONE, Process
from leanmim.recompute import checkpoint_blocks
from leanmim.sharded import Sharded
from leanmim.step import align_state


class OnDevice(Placed):
    """The model as a whole on the device. Among several processes the gradients are averaged by DistributedDataParallel, or,
    where segments step one by one, by `update`. The optimizer's state may wait in host memory.
    """

    def __init__(
        self, model: MIM, device: torch.device, process: Process = ALONE, state: StateOffload | None = None
    ) -> None:
        self.model, self.state = model.to(device), state
        self.losses = model
        if process.world > 1 and len(model.decoders) == 1:
            ids = [device.index] if device.type == "cuda" else None
            # Its output is a generator, in which it finds no tensor. So it must not look there: with
            # find_unused_parameters it takes every parameter for unused and raises, with static_graph the gradients are
            # never averaged and nothing tells (tests/test_placement.py).
            self.losses = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def settle(self) -> None:
        """Only the optimizer's state may be on its way."""
        if self.state:
            self.state.settle()

    @contextmanager
    def whole(self) -> Iterator[MIM]:
        """All of it is there always."""
        yield self.model


def offloads(config: Pretrain, device: torch.device) -> bool:
    """Whether segments wait in host memory: where a device has memory of its own."""
    return config.offload and config.cut and device.type == "cuda"


def offloads_state(config: Pretrain, device: torch.device) -> bool:
    """Whether only the optimizer's state waits in host memory: as `offloads`, of training end to end."""
    return config.offload and not config.cut and device.type == "cuda"


def update_options(config: Pretrain, device: torch.device) -> dict[str, Any]:
    """The arguments of `update` that follow from where `place` puts a model."""
    return {
        "average": not config.pipeline,
        "segment_first": offloads(config, device),
        "in_backward": config.update_in_backward,
    }


def compile_parts(model: MIM) -> None:
    """Compile encoder and decoders, for shapes that stay: a version for each segment and input size."""
    torch._dynamo.config.recompile_limit = 16 * len(model.decoders)
    model.encoder.segment = torch.compile(model.encoder.segment, dynamic=False)  # type: ignore[method-assign]
    for decoder in model.decoders:
        decoder.compile(dynamic=False)


def place(
    model: MIM,
    optimizers: list[Optimizer],
    config: Pretrain,
    device: torch.device,
    process: Process = ALONE,
    parts: Sequence[range] = (),
) -> Placed:
    """The model, compiled as asked, where it is to train; its optimizers exist already, and no value is ``auto``. Errors as for
    `Sharded` and `checkpoint_blocks`.

    Args:
        model: in host memory or on the device.
        optimizers: one for each segment.
        config: of a phase.
        device: where this process trains.
        process: this one among all.
        parts: in a pipeline the segments of each process.
    """
    model.train()
    if config.checkpointing:
        checkpoint_blocks(model.encoder, model.decoders)
    if config.shard:
        return Sharded(model, optimizers, config, device, process)
    if config.compile is True:
        compile_parts(model)
    if offloads(config, device):
        return Offload(model, optimizers, device)
    if config.channels_last is True:
        model.to(memory_format=torch.channels_last)
        align_state(optimizers)
    if parts:
        return Pipeline(model, optimizers, device, process, parts, config.accum)
    state = StateOffload(optimizers, device) if offloads_state(config, device) else None
    return OnDevice(model, device, process, state)
