"""Where a model trains: on one device, in several processes, or one segment at a time on the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.mim import MIM
from leanmim.offload import Offload
from leanmim.offload_state import StateOffload
from leanmim.processes import ALONE, Process
from leanmim.recompute import checkpoint_blocks
from leanmim.step import align_state


@runtime_checkable
class Placement(Protocol):
    """A model, its optimizers, and where they are."""

    @property
    def losses(self) -> Callable[[Tensor], Iterator[Tensor]]:
        """What `update` calls."""
        ...

    def settle(self) -> None:
        """Wait until all weights and optimizer state may be read."""
        ...

    def whole(self) -> Any:
        """A context in which all weights are on the device, to evaluate the model."""
        ...


class OnDevice:
    """The model as a whole on the device. Among several processes the gradients are averaged by DistributedDataParallel, or,
    where segments step one by one, by `update`. The optimizer's state may wait in host memory.
    """

    def __init__(
        self, model: MIM, device: torch.device, process: Process = ALONE, state: StateOffload | None = None
    ) -> None:
        self.state = state
        self.losses: Callable[[Tensor], Iterator[Tensor]] = model.to(device)
        if process.world > 1 and len(model.decoders) == 1:
            ids = [device.index] if device.type == "cuda" else None
            self.losses = DistributedDataParallel(model, device_ids=ids)

    def settle(self) -> None:
        """Only the optimizer's state may be on its way."""
        if self.state:
            self.state.settle()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All of it is there always."""
        yield


def offloads(config: Pretrain, device: torch.device) -> bool:
    """Whether segments wait in host memory: where a device has memory of its own."""
    return config.offload and config.cut and device.type == "cuda"


def offloads_state(config: Pretrain, device: torch.device) -> bool:
    """Whether only the optimizer's state waits in host memory: as `offloads`, of training end to end."""
    return config.offload and not config.cut and device.type == "cuda"


def compile_parts(model: MIM) -> None:
    """Compile encoder and decoders, for shapes that stay: a version for each segment and input size."""
    torch._dynamo.config.recompile_limit = 16 * len(model.decoders)
    model.encoder.segment = torch.compile(model.encoder.segment, dynamic=False)  # type: ignore[method-assign]
    for decoder in model.decoders:
        decoder.compile(dynamic=False)


def place(
    model: MIM, optimizers: list[Optimizer], config: Pretrain, device: torch.device, process: Process = ALONE
) -> Placement:
    """The model, compiled as asked, where it is to train; its optimizers exist already, and no value is ``auto``.

    Raises:
        UserError: there are several processes to update in backward, or the backbone cannot be checkpointed.
    """
    model.train()
    if config.update_in_backward and process.world > 1:
        raise UserError(
            "--update-in-backward steps before the gradients of several processes are averaged; leave it out, or train in one process"
        )
    if config.checkpointing:
        checkpoint_blocks(model.encoder, model.decoders)
    if config.compile is True:
        compile_parts(model)
    if offloads(config, device):
        return Offload(model, optimizers, device)
    if config.channels_last is True:
        model.to(memory_format=torch.channels_last)
        align_state(optimizers)
    return OnDevice(
        model, device, process, StateOffload(optimizers, device) if offloads_state(config, device) else None
    )
