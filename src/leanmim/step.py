"""One optimizer step: shared by training, by the count of its cost and by the plan."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from leanmim.checkpoint import REMEDY
from leanmim.config import Pretrain
from leanmim.encoders.backbone import Backbone
from leanmim.errors import Damaged, UserError
from leanmim.in_backward import InBackward, step_if
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


def load_state(optimizers: list[Optimizer], states: list[dict[str, Any]]) -> None:
    """Continue with the optimizers' state of a checkpoint.

    Raises:
        UserError: an earlier version grouped the parameters in another way (weight decay).
        Damaged: it is the state of other parameters, or one that AdamW cannot have.
    """
    if len(optimizers) != len(states):
        raise Damaged(
            f"the checkpoint is damaged: it has {len(states)} optimizers for {len(optimizers)} segments; {REMEDY}"
        )
    for optimizer, state in zip(optimizers, states, strict=True):
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
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    align_state(optimizers)


def align_state(optimizers: list[Optimizer]) -> None:
    """Lay the moments out in memory as the parameters are, which fused kernels take for granted."""
    for optimizer in optimizers:
        for parameter, own in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if own[name].stride() != parameter.stride():
                    there = own[name].device  # which may be the host
                    own[name] = torch.empty_like(parameter, device=there, requires_grad=False).copy_(own[name])


def check_moments(optimizer: Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Raise Damaged unless these can be AdamW's moments of the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
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


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients among all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients).div_(dist.get_world_size())
    if not isinstance(flat, FakeTensor):  # torch 2.8 cannot reduce what is only counted
        dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat, gradients)


def gradient_norm(parameters: list[nn.Parameter], clip_grad: float) -> Float[Tensor, ""]:
    """The norm of all gradients together, which are then shortened to ``clip_grad`` at most; 0 is no clipping."""
    if clip_grad:
        return nn.utils.clip_grad_norm_(parameters, clip_grad)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def update(
    losses: Callable[[Any], Iterator[Tensor]],
    optimizers: list[Optimizer],
    batches: Iterable[Any],
    accum: int = 1,
    clip_grad: float = 0.0,
    seeds: Sequence[int] = (),
    in_backward: bool = False,
) -> Float[Tensor, " s"]:
    """One step over ``accum`` batches: of normalised images, in fine-tuning with their targets.

    In the last batch each segment steps, and frees its gradients, right after its own backward pass. Among several
    processes its gradients are averaged before, unless DistributedDataParallel has done so. A segment whose loss or
    gradient is not finite is left as it is, alike in all processes.

    Args:
        losses: a `MIM`, bare or in DistributedDataParallel.
        optimizers: one per segment.
        batches: as many as ``accum``.
        accum: batches whose gradients are averaged.
        clip_grad: largest norm of a segment's gradient; 0 is no clipping.
        seeds: for each batch that of torch's global generator, which draws masks; empty leaves it as it is.
        in_backward: step each parameter in the backward pass, as soon as its gradient has arrived (`InBackward`); of one batch, in one
            process, without clipping.

    Returns:
        The loss of each segment, averaged over the batches; NaN where it did not step.
    """
    means: list[Any] = [0.0] * len(optimizers)
    averages = dist.is_initialized() and not isinstance(losses, DistributedDataParallel)
    assert not in_backward or (accum == 1 and not clip_grad and not dist.is_initialized())
    for micro, images in enumerate(batches, start=1):
        if seeds:
            torch.manual_seed(seeds[micro - 1])
        last = micro == accum
        waits = isinstance(losses, DistributedDataParallel) and not last  # it averages after the last batch only
        with losses.no_sync() if waits else contextlib.nullcontext():  # type: ignore[attr-defined]
            for i, loss in enumerate(losses(images)):
                finite = 1 + 0 * loss.detach()  # or NaN: so the gradient tells of the loss, in all processes
                steps = InBackward(optimizers[i], loss) if in_backward else None
                with steps or contextlib.nullcontext():
                    (loss * finite / accum).backward()
                means[i] = means[i] + loss.detach() / accum
                if steps:
                    means[i] = torch.where(steps.good, means[i], torch.nan)
                elif last:
                    parameters = [p for group in optimizers[i].param_groups for p in group["params"]]
                    if averages:
                        average_gradients(parameters)
                    norm = gradient_norm(parameters, clip_grad)
                    step_if(optimizers[i], norm.isfinite())
                    optimizers[i].zero_grad()
                    means[i] = torch.where(norm.isfinite(), means[i], torch.nan)
    return torch.stack(means)
