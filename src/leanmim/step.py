"""One optimizer step: shared by training, by the count of its cost and by the plan."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from leanmim.checkpoint import REMEDY
from leanmim.config import Pretrain
from leanmim.encoders.backbone import Backbone
from leanmim.errors import Damaged, UserError
from leanmim.in_backward import InBackward, step_if, trained_by
from leanmim.mim import MIM


def no_weight_decay(model: MIM) -> set[nn.Parameter]:
    """The parameters without weight decay: biases, norms, scales and tokens, which are vectors whatever their number of
    axes, and what the backbone itself exempts (timm's ``no_weight_decay``: position tables and the like).
    """
    return vectors(model, model.encoder.backbone)


def vectors(model: nn.Module, backbone: Backbone) -> set[nn.Parameter]:
    """Of any model around a timm model: as `no_weight_decay`."""
    exempt: set[str] = getattr(backbone, "no_weight_decay", set)()
    named = {p for name, p in backbone.named_parameters() if name in exempt or name == "reg_token"}
    return named | {p for p in model.parameters() if sum(side > 1 for side in p.shape) <= 1}


def parameter_groups(model: MIM) -> list[list[dict[str, Any]]]:
    """For each segment, its parameters with weight decay and those without."""
    exempt = no_weight_decay(model)
    groups: list[list[dict[str, Any]]] = []
    for i in range(len(model.decoders)):
        own = model.parameters_of(i)
        groups.append([
            {"params": [p for p in own if p not in exempt]},
            {"params": [p for p in own if p in exempt], "weight_decay": 0.0},
        ])  # fmt: skip
    return groups


def optimizer_named(name: str) -> Callable[..., Optimizer]:
    """The class of an --optimizer.

    Raises:
        UserError: its package is not installed.
    """
    if name == "adamw":
        return AdamW
    try:
        from leanmim.eight_bit import AdamW8bit  # which takes seconds
    except ImportError as error:
        raise UserError(
            f"--optimizer {name} needs the package torchao ({error}): pip install 'leanmim[memory]', or --optimizer adamw"
        ) from error
    return AdamW8bit


def make_optimizers(model: MIM, config: Pretrain) -> list[Optimizer]:
    """One for each segment. Errors as for `optimizer_named`."""
    given: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        given["fused"] = next(model.parameters()).device.type != "mps"
    return [optimizer_named(config.optimizer)(groups, **given) for groups in parameter_groups(model)]


def load_state(
    optimizers: list[Optimizer], states: list[dict[str, Any]], loaded: Callable[[int], object] = lambda i: None
) -> None:
    """Continue with the optimizers' state of a checkpoint; ``loaded`` is told the number of each that has its own.

    Raises:
        UserError: an earlier version grouped the parameters in another way (weight decay).
        Damaged: it is the state of other parameters, or one that AdamW cannot have.
    """
    if len(optimizers) != len(states):
        raise Damaged(
            f"the checkpoint is damaged: it has {len(states)} optimizers for {len(optimizers)} segments; {REMEDY}"
        )
    for i, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        sizes = [
            [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
        ]
        if sizes[0] != sizes[1]:
            raise UserError(
                "this run was begun by a version of leanmim that gave weight decay to other parameters of this model: finish "
                "it with that version, or start afresh with --overwrite, perhaps with --init from its checkpoint"
            )
        check_moments(optimizer, state["state"])
        groups = optimizer.state_dict()["param_groups"]  # betas and the like are the configuration's
        parameters = trained_by(optimizer)
        own = {key: {name: laid_out(value, parameters[key]) for name, value in moments.items()}
               for key, moments in state["state"].items()}  # fmt: skip
        optimizer.load_state_dict({"state": own, "param_groups": groups})
        loaded(i)
    align_state(optimizers)


def align_state(optimizers: list[Optimizer]) -> None:
    """Lay the moments out in memory as the parameters are, which fused kernels take for granted."""
    for optimizer in optimizers:
        for parameter, own in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                own[name] = laid_out(own[name], parameter)
                if own[name].stride() != parameter.stride():
                    there = own[name].device  # which may be the host
                    own[name] = torch.empty_like(parameter, device=there, requires_grad=False).copy_(own[name])


def laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A parameter's moment, shared out among the processes or whole as the parameter is; what has no axes is whole always."""
    if value.ndim == 0 or isinstance(value, DTensor) == isinstance(parameter, DTensor):
        return value
    if isinstance(value, DTensor):
        return value.full_tensor()
    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def check_moments(optimizer: Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Raise Damaged unless these can be AdamW's moments of the parameters."""
    parameters = trained_by(optimizer)
    for key, own in state.items():
        expected = moments_of(optimizer, parameters[key]) if key < len(parameters) else {}
        fits = own.keys() == expected.keys() and all(
            own[name].shape == like.shape and own[name].is_floating_point() == like.is_floating_point()
            for name, like in expected.items()
        )
        if not fits or any(bool((own[name] < 0).any()) for name in own.keys() - {"exp_avg"}):
            raise Damaged(f"the checkpoint is damaged: its optimizer's state does not fit parameter {key}; {REMEDY}")


def moments_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Tensors of the shapes and kinds that a checkpoint has of a parameter's state."""
    if own := getattr(optimizer, "moments_of", None):  # of 8 bits
        return own(parameter)
    return {"step": torch.empty(()), "exp_avg": parameter, "exp_avg_sq": parameter}


class Averages:
    """Gradients on their way: averaged among all processes while this one computes on.

    Args:
        parameters: of a segment; their gradients are gone until they `arrive`.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.grad is not None]
        flat = torch.empty(sum(p.numel() for p in self.parameters), device=parameters[0].device)
        parts = flat.split([p.numel() for p in self.parameters])
        # dense in memory, each as its parameter is, which fused kernels take for granted
        self.gradients = [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, self.parameters, strict=True)]
        for gradient, p in zip(self.gradients, self.parameters, strict=True):
            gradient.copy_(p.grad)
            p.grad = None
        flat.div_(dist.get_world_size())
        fake = isinstance(flat, FakeTensor)  # torch 2.8 cannot reduce what is only counted
        self.work = None if fake else dist.all_reduce(flat, async_op=True)

    def arrive(self) -> None:
        """Let the computation wait for them; on a GPU the host does not."""
        if self.work:
            self.work.wait()
        for gradient, p in zip(self.gradients, self.parameters, strict=True):
            p.grad = gradient


def gradient_norm(parameters: list[nn.Parameter], clip_grad: float) -> Float[Tensor, ""]:
    """The norm of all gradients together, which are then shortened to ``clip_grad`` at most; 0 is no clipping."""
    if clip_grad:
        norm = nn.utils.clip_grad_norm_(parameters, clip_grad)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def averages_itself(losses: Callable[[Any], Iterator[Tensor]]) -> bool:
    """Whether it is in DistributedDataParallel, or what stands for it where memory is counted."""
    return hasattr(losses, "no_sync")


Passes = Iterator[tuple[int, Tensor, bool]]  # the segment, its loss, and whether this is the last batch


def by_batch(
    losses: Callable[[Any], Iterator[Tensor]], batches: Iterable[Any], accum: int, seeds: Sequence[int]
) -> Passes:
    """The forward passes of a step, all segments of a batch before the next one; arguments as for `update`."""
    for micro, images in enumerate(batches):
        if seeds:
            torch.manual_seed(seeds[micro])
        last = micro == accum - 1
        waits = averages_itself(losses) and not last  # it averages after the last batch only
        with losses.no_sync() if waits else contextlib.nullcontext():  # type: ignore[attr-defined]
            for i, loss in enumerate(losses(images)):
                yield i, loss, last


def by_segment(
    losses: Callable[[Any], Iterator[Tensor]], batches: Iterable[Any], accum: int, seeds: Sequence[int], segments: int
) -> Passes:
    """As `by_batch`, but all batches of a segment before the next one.

    The numbers are the same: a segment's input comes from the one before as it is before its step, a segment meets the
    batches in the same order, and each batch goes on with the draws of its own seed.
    """
    running: list[Iterator[Tensor]] = []
    draws: list[Draws] = []
    images = iter(batches)
    for i in range(segments):
        for micro in range(accum):
            if i == 0:
                batch = next(images)
                draws.append(Draws(batch.device))
                if seeds:
                    torch.manual_seed(seeds[micro])
                running.append(losses(batch))
                del batch
            else:
                draws[micro].go_on()
            yield i, next(running[micro]), micro == accum - 1
            draws[micro].stop()


class Draws:
    """Where a batch is in the sequence of random numbers, on the host and on its device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type in ("cuda", "mps") else None

    def stop(self) -> None:
        """Remember it."""
        self.host = torch.get_rng_state()
        self.own = getattr(torch, self.device.type).get_rng_state() if self.device else None

    def go_on(self) -> None:
        """Go on from there."""
        torch.set_rng_state(self.host)
        if self.device:
            getattr(torch, self.device.type).set_rng_state(self.own)


def update(
    losses: Callable[[Any], Iterator[Tensor]],
    optimizers: list[Optimizer],
    batches: Iterable[Any],
    accum: int = 1,
    clip_grad: float = 0.0,
    seeds: Sequence[int] = (),
    average: bool = True,
    segment_first: bool = False,
    in_backward: bool = False,
) -> Float[Tensor, " s"]:
    """One step over ``accum`` batches: of normalised images, in fine-tuning with their targets.

    In the last batch each segment steps, and frees its gradients, right after its own backward pass. Among several
    processes its gradients are averaged before, unless DistributedDataParallel has done so: during the forward pass of the
    next segment, which does not depend on the step. A segment whose loss or gradient is not finite is left as it is, alike in
    all processes.

    Args:
        losses: a `MIM`, bare or in DistributedDataParallel.
        optimizers: one per segment.
        batches: as many as ``accum``.
        accum: batches whose gradients are averaged.
        clip_grad: largest norm of a segment's gradient; 0 is no clipping.
        seeds: for each batch that of torch's global generator, which draws masks; empty leaves it as it is.
        average: whether several processes have each a part of the step's images.
        segment_first: all batches of a segment come before the next segment, and so does its step, as `Offload` needs it.
            With seeds the numbers are the same. What the next segment needs of each batch is kept.
        in_backward: step each parameter in the backward pass, as soon as its gradient has arrived (`InBackward`); of one batch, in one
            process, without clipping.

    Returns:
        The loss of each segment, averaged over the batches; NaN where it did not step.
    """
    means: list[Any] = [0.0] * len(optimizers)
    parameters = [trained_by(optimizer) for optimizer in optimizers]
    shared = isinstance(parameters[0][0], DTensor)  # whose gradients are averages already (FSDP)
    averages = average and dist.is_initialized() and not (shared or averages_itself(losses))
    assert not in_backward or (accum == 1 and not clip_grad and not averages)
    waiting: list[tuple[int, Averages]] = []  # the segment before

    def step(i: int, gradients: Averages | None = None) -> None:
        if gradients:
            gradients.arrive()
        norm = gradient_norm(parameters[i], clip_grad)
        step_if(optimizers[i], norm.isfinite())
        optimizers[i].zero_grad()
        means[i] = torch.where(norm.isfinite(), means[i], torch.nan)

    if segment_first and accum > 1:
        passes = by_segment(losses, batches, accum, seeds, len(optimizers))
    else:
        passes = by_batch(losses, batches, accum, seeds)
    for i, loss, last in passes:
        while waiting:  # its gradients were averaged during this forward pass
            step(*waiting.pop())
        finite = 1 + 0 * loss.detach()  # or NaN: so the gradient tells of the loss, in all processes
        if in_backward:
            with InBackward(optimizers[i], loss) as steps:
                (loss * finite).backward()
            means[i] = torch.where(steps.good, loss.detach(), torch.nan)
            continue
        (loss * finite / accum).backward()
        means[i] = means[i] + loss.detach() / accum
        if last and not averages:
            step(i)
        elif last and segment_first:
            step(i, Averages(parameters[i]))
        elif last:
            waiting.append((i, Averages(parameters[i])))
    while waiting:
        step(*waiting.pop())
    return torch.stack(means)
