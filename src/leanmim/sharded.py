"""Weights, gradients and optimizer state shared out among processes, block by block: torch's FSDP2 (`fully_shard`).

Each process keeps its share of every tensor. The weights of a block are gathered for its forward pass and again for its
backward pass, in float32, as autocast expects them; the gradients are averaged and shared out right after it. So a process
holds all weights of a few blocks only. What belongs to no block (stem, tokens, norms) is one further group, the root's.

Block-wise training has a backward pass for each segment, after which FSDP lets the root's group go: it is gathered again
for the next segment. No gradient crosses a segment, and none is shared out twice.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from leanmim.config import Pretrain
from leanmim.encoders.backbone import Backbone
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.mim import MIM
from leanmim.placed import Placed
from leanmim.processes import Process
from leanmim.step import align_state


class Sharded(Placed):
    """A model of which each process has a share. Weights and optimizer state that are there already are shared out, too.

    Args:
        model: the same in all processes; its parameters are replaced.
        optimizers: one per segment; from now on they train the shares.
        config: of the model.
        device: where the shares are.
        process: this one among all; all must call this.

    Raises:
        UserError: FSDP does not take the model.
    """

    def __init__(
        self, model: MIM, optimizers: list[Optimizer], config: Pretrain, device: torch.device, process: Process
    ) -> None:
        self.model, self.optimizers, self.config, self.device = model, optimizers, config, device
        names = {parameter: name for name, parameter in model.named_parameters()}
        # of blocks that return views; nothing is changed in place between the blocks
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(device.type, (process.world,))
        try:
            for module in (*blocks_of(model), model):
                own = fully_shard(module, mesh=mesh)
                own.set_force_sum_reduction_for_comms(device.type != "cuda")  # torch 2.8 takes gloo's sum for its mean
        except (ValueError, NotImplementedError) as error:  # as for a parameter without axes
            raise UserError(f"--shard: torch cannot shard {config.model} ({error}); leave --shard out") from error
        hand_over(optimizers, names, model)

    def losses(self, images: Float[Tensor, "b c H W"]) -> Iterator[Float[Tensor, ""]]:
        """The model's losses, one per segment; the root's group is there for each."""
        assert isinstance(self.model, FSDPModule)
        losses = self.model(images)
        for _ in self.model.decoders:
            self.model.unshard()
            yield next(losses)

    def settle(self) -> None:
        """Nothing is on its way."""

    @contextmanager
    def whole(self) -> Iterator[MIM]:
        """A copy with all weights in each process; all must call this."""
        with torch.random.fork_rng(devices=[]):
            copy = build(self.config)
        copy.load_state_dict({name: whole(value) for name, value in self.model.state_dict().items()}, assign=True)
        copy.autocast = self.model.autocast
        yield copy.to(self.device)

    def gather(self) -> MIM:
        """The end of the sharing: the whole model, which the optimizers train from now on, with all of their state."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        with self.whole() as model:
            hand_over(self.optimizers, names, model)
        return model


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which each process has a share."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def blocks_of(model: MIM) -> list[nn.Module]:
    """Blocks of encoder and decoders, and the decoders; what lies within another comes first."""
    found = numbered(model.encoder.backbone)
    for decoder in model.decoders:
        found += [*getattr(decoder, "layers", ()), decoder]
    return found


def numbered(backbone: Backbone) -> list[nn.Module]:
    """What timm numbers for layer decay: the blocks, and what lies between the stages."""
    groups = backbone.group_matcher().values() if hasattr(backbone, "group_matcher") else ()
    patterns = [own if isinstance(own, str) else own[0] for group in groups
                for own in (group if isinstance(group, list) else [group])]  # fmt: skip
    counted = [pattern for pattern in patterns if isinstance(pattern, str) and r"\d" in pattern]
    return [module for name, module in reversed([*backbone.named_modules()])
            if any(re.fullmatch(pattern, name) for pattern in counted) and [*module.parameters()]]  # fmt: skip


def hand_over(optimizers: list[Optimizer], names: dict[nn.Parameter, str], model: nn.Module) -> None:
    """Let optimizers train a model's parameters in place of others, with the state that they have.

    Args:
        optimizers: to change.
        names: of the parameters that they train so far.
        model: with parameters of these names.
    """
    own = dict(model.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            before = list(group["params"])
            group["params"] = [own[names[parameter]] for parameter in before]
            for parameter, other in zip(before, group["params"], strict=True):
                if parameter in optimizer.state:
                    optimizer.state[other] = optimizer.state.pop(parameter)
    align_state(optimizers)
