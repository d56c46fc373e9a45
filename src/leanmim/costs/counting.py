"""The cost of a training step: the real `update` on fake tensors."""

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from leanmim.config import Pretrain
from leanmim.config.base import Stored
from leanmim.costs.buckets import Buckets
from leanmim.costs.flops import Flops, NoneUncounted, Stopwatch, flop_counter
from leanmim.costs.kernels import AsOnCuda, cuda_workspaces
from leanmim.costs.storages import Held, Storages
from leanmim.data import Normalise
from leanmim.decoder import Decoder
from leanmim.device import resolve_precision
from leanmim.encoders.backbone import backbone_of
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.fake import fake_tensors
from leanmim.mim import MIM
from leanmim.offload import Offload
from leanmim.offload_state import StateOffload
from leanmim.pipeline import balanced
from leanmim.recipes import titles
from leanmim.recompute import checkpoint_blocks
from leanmim.rooms import inner_tensors
from leanmim.schedule import phase_named, phases
from leanmim.step import make_optimizers, optimizer_named, update
from leanmim.targets import with_levels


@dataclass(frozen=True)
class StepCost:
    """What one training step of a recipe costs. Bytes are peaks over the step, each kind's own."""

    title: str
    """The recipe's name and what is changed in it, for example "pr-mim throw=0.7"."""
    recipe: str
    model: str
    batch_size: int
    """Images of one forward pass."""
    forward_flops_per_image: int
    train_flops_per_image: int
    """Forward and backward."""
    segment_flops: tuple[int, ...]
    """The same of each segment: what a process of a pipeline computes for it. The target is in none."""
    segment_parameters: tuple[int, ...]
    """Parameters that each segment trains."""
    message_bytes: int
    """Of a batch, from one process of a pipeline to the next: images, and features at a segment's end."""
    encoder_parameters: int
    decoder_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    """Kept by autograd for the backward pass, weights aside."""
    transient_bytes: int
    """All that is none of the above: inputs, intermediate results, copies in another precision."""
    peak_bytes: int
    """Of everything at once; not the sum of the kinds, whose peaks fall at different times."""
    allocator: str
    """What is taken for granted of the allocator."""
    encoder_tokens: int
    """Tokens that the encoder returns for an image."""
    decoder_tokens: int
    """Tokens that the decoder's layers see."""
    input_sizes: tuple[tuple[int, int], ...]
    """Height and width of the input in each phase, px."""

    def shared(self, world: int) -> "StepCost":
        """The same with weights and optimizer state shared out among so many processes (FSDP). Gradients still count as a whole,
        which stands for the blocks whose weights and gradients are gathered: an upper bound.
        """
        spared = {name: getattr(self, name) * (world - 1) // world for name in ("weight_bytes", "optimizer_bytes")}
        own: dict[str, Any] = {name: getattr(self, name) - size for name, size in spared.items()}
        return replace(self, **own, peak_bytes=self.peak_bytes - sum(spared.values()))

    def piped(self, world: int, accum: int) -> "StepCost":
        """The same in a pipeline of so many processes, of the one that needs the most memory. Gradients and activations are those of the
        segment that has the most, in whichever process it is: an upper bound.
        """
        parts = balanced(self.segment_flops, world)
        share = max(sum(self.segment_parameters[i] for i in part) for part in parts) / sum(self.segment_parameters)
        spared = {name: int(getattr(self, name) * (1 - share)) for name in ("weight_bytes", "optimizer_bytes")}
        own: dict[str, Any] = {name: getattr(self, name) - size for name, size in spared.items()}
        messages = 3 * accum * self.message_bytes  # of a step: those that come, are worked on, and go
        step = self.peak_bytes - sum(spared.values()) + messages
        # to save or evaluate, all weights come together
        return replace(self, **own, peak_bytes=max(step, self.weight_bytes + own["optimizer_bytes"]))


def count(config: Pretrain, device: str = "cpu") -> tuple[StepCost, dict[str, Flops]]:
    """The cost of a recipe: with phases, the bytes and tokens of the one with the highest peak, and the FLOPs of an
    image on average over the epochs. Arguments, result and errors as for `count_phase`.
    """
    table = phases(config)
    counted = []
    for number, phase in enumerate(table):
        with phase_named(config, number, phase.config):
            counted.append(count_phase(phase.config, device))
    shares = [(phase.stop - phase.start) / table[-1].stop for phase in table]
    of_segments = zip(*(cost.segment_flops for cost, _ in counted), strict=True)
    flops = {
        name: {part: round(sum(share * f[name][part] for share, (_, f) in zip(shares, counted, strict=True)))
               for part in parts}
        for name, parts in counted[0][1].items()
    }  # fmt: skip
    largest = max((cost for cost, _ in counted), key=lambda cost: cost.peak_bytes)
    cost = replace(
        largest,
        title=titles([config])[0],
        input_sizes=tuple(size for cost, _ in counted for size in cost.input_sizes),
        forward_flops_per_image=sum(flops["forward"].values()),
        train_flops_per_image=sum(flops["training"].values()),
        segment_flops=tuple(round(sum(map(operator.mul, shares, of_one))) for of_one in of_segments),
    )
    return cost, flops


def count_phase(config: Pretrain, device: str = "cpu") -> tuple[StepCost, dict[str, Flops]]:
    """Count one training step as `update` does it, accumulation included.

    Args:
        config: the recipe, of one phase; its batch size, accumulation and precision count too.
        device: ``cpu`` or ``cuda``; the machine need not have it.

    Returns:
        The cost, and FLOPs of an image: ``forward`` or ``training``, then by part.

    Raises:
        UserError: the recipe cannot be built or counted, or its batch size is ``auto``.
    """
    if config.batch_size == "auto":
        raise UserError("a step cannot be counted with --batch-size auto; give a number")
    cuda = device == "cuda"
    if cuda and config.precision == "auto" and not torch.cuda.is_available():
        config = replace(config, precision="bf16")
    backbone = backbone_of(config, config.depth, device="meta")
    optimizer_named(config.optimizer)  # imported before tensors are fake
    with fake_tensors():
        model = build(config, backbone.to_empty(device="cpu")).train()
        model.autocast = resolve_precision(config.precision, torch.device(device))
        if config.checkpointing:
            checkpoint_blocks(model.encoder, model.decoders)
        parameters, of_decoders = (sum(p.numel() for p in part.parameters()) for part in (model, model.decoders))
        storages, flops, tokens, segments, message = count_step(
            model, with_state(make_optimizers(model, config), model), config, cuda
        )
    cost = StepCost(
        title=titles([config])[0],
        recipe=config.recipe,
        model=config.model,
        batch_size=int(config.batch_size),
        forward_flops_per_image=sum(flops["forward"].values()),
        train_flops_per_image=sum(flops["training"].values()),
        segment_flops=segments,
        segment_parameters=tuple(sum(p.numel() for p in model.parameters_of(i)) for i in range(len(segments))),
        message_bytes=message,
        encoder_parameters=parameters - of_decoders,
        decoder_parameters=of_decoders,
        encoder_tokens=tokens["encoder"],
        decoder_tokens=tokens["decoder"],
        input_sizes=(config.size,),
        **peaks(storages, cuda),
    )
    return cost, flops


ALLOCATORS = {
    "cpu": "the system's allocator, which gives freed memory back",
    "cuda": "torch's CUDA allocator with expandable segments: sizes rounded up to 512 bytes, no memory lost between them, two "
    "workspaces of cuBLAS",
}


def peaks(storages: Storages, cuda: bool) -> dict[str, Any]:
    """The bytes of a `StepCost`, and the allocator."""
    peak = storages.peak
    return {
        "weight_bytes": peak["weights"],
        "gradient_bytes": peak["gradients"],
        "optimizer_bytes": peak["optimizer"],
        "saved_bytes": peak["saved"],
        "transient_bytes": peak["transient"],
        "peak_bytes": peak["all"] + (cuda_workspaces() if cuda else 0),
        "allocator": ALLOCATORS["cuda" if cuda else "cpu"],
    }


def with_state(optimizers: list[Optimizer], model: nn.Module) -> list[Optimizer]:
    """The optimizers with their state, as before any step but the first."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return optimizers


def follow_all(model: nn.Module, optimizers: list[Optimizer], cuda: bool) -> Storages:
    """Storages that know the weights and the optimizers' state."""
    storages = Storages(round_to=512 if cuda else 1)
    for tensor in (*model.parameters(), *model.buffers()):
        storages.follow(tensor, "weights")
    for optimizer in optimizers:
        for value in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
            for tensor in inner_tensors(value):
                storages.follow(tensor, "optimizer")
    return storages


def count_step(
    model: MIM, optimizers: list[Optimizer], config: Pretrain, cuda: bool
) -> tuple[Storages, dict[str, Flops], dict[str, int], tuple[int, ...], int]:
    """Run a step, with all who watch it.

    Args:
        model: on fake tensors.
        optimizers: one for each segment, their state is there.
        config: the recipe.
        cuda: whether to do as CUDA does, offloading included. Among several processes it is as in each of them.

    Returns:
        The storages, the FLOPs of an image, the tokens of encoder and decoder, the FLOPs of each segment, and the bytes of a
        batch between two processes of a pipeline.
    """
    batch = int(config.batch_size)
    half = [0.5] * config.channels  # whatever they are
    normalise = Normalise(half, half, torch.device("cpu"))
    model.target = with_levels(model.target, config.read_as, half, half)
    kind = torch.float32 if isinstance(config.read_as, Stored) else torch.uint8  # of what the readers hand over
    images = torch.empty(batch, config.channels, *config.size, dtype=kind)
    storages = follow_all(model, optimizers, cuda)
    trained: MIM | Offload = model
    if config.offload and cuda:
        with storages:
            rooms = Offload(model, optimizers, images.device) if config.cut else StateOffload(optimizers, images.device)
        trained = rooms if isinstance(rooms, Offload) else model
        storages.follow(rooms.memory, "host")
        for room in rooms.rooms:
            for memory, what in zip(room, ("weights", "optimizer"), strict=True):
                storages.follow(memory, what)
        storages.peak = storages.now.copy()
    with flop_counter() as of_target:
        model.target(normalise(images))
    counter = flop_counter()
    watch = Stopwatch(counter, trained, cast(list[Decoder], model.decoders))

    segment_first = isinstance(trained, Offload)
    losses: Any = watch.losses
    if dist.is_initialized() and len(optimizers) == 1 and not config.shard:
        losses = Buckets(losses, [p for p in model.parameters() if p.requires_grad], storages)
    accum = min(config.accum, 3 if segment_first else 2)  # the next batch finds what the last one found
    found: list[int] = []  # bytes before each batch
    feed = batches(images, normalise, accum, lambda: found.append(storages.now["all"]))
    with watched(model, storages, counter, cuda):
        update(
            losses, optimizers, feed, accum, config.clip_grad,
            average=not config.pipeline, segment_first=segment_first, in_backward=config.update_in_backward,
        )  # fmt: skip
    if segment_first and accum < config.accum:
        waiting = (config.accum - accum) * (found[2] - found[1])  # or what the others have left for the next segment
        for what in ("transient", "all"):
            storages.peak[what] += waiting
    target = of_target.get_total_flops() // batch  # which the first segment was counted with
    flops = watch.per_image(batch * accum, target)
    segments = [watch.segments[i] // (batch * accum) - (0 if i else target) for i in range(len(model.decoders))]
    return storages, flops, watch.tokens, tuple(segments), images.nbytes + watch.read_bytes


@contextmanager
def watched(model: nn.Module, storages: Storages, counter: FlopCounterMode, cuda: bool) -> Iterator[None]:
    """Count what is done inside: FLOPs, and the storages of the model's gradients, of what autograd saves, of all else."""

    def follow_gradient(parameter: Tensor) -> None:
        storages.follow(cast(Tensor, parameter.grad), "gradients")

    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(follow_gradient).remove)
        modes: list[Any] = [saved_tensors_hooks(lambda tensor: Held(tensor, storages), lambda held: held.tensor)]
        modes += [AsOnCuda()] if cuda else []
        for mode in (*modes, storages, NoneUncounted(counter), counter):  # the last one sees an operator first
            stack.enter_context(mode)
        yield


def batches(
    images: Tensor, normalise: Normalise, accum: int, before: Callable[[], object] = lambda: None
) -> Iterator[Tensor]:
    """Batches as the training loop makes them: the bytes live as long as the batch is worked on. ``before`` is called before
    each.
    """
    for _ in range(accum):
        before()
        read = images.clone()
        yield normalise(read)
