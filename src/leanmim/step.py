"""One optimizer step: shared by training, by the count of its cost and by the plan."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from leanmim.config import Pretrain
from leanmim.mim import MIM


def parameter_groups(model: MIM) -> list[list[dict[str, Any]]]:
    """For each segment, its parameters with weight decay and those without: biases, norms, tokens, position tables."""
    groups: list[list[dict[str, Any]]] = [[{"params": []}, {"params": [], "weight_decay": 0.0}] for _ in model.decoders]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in ("token", "pos_embed", "position"))
            groups[model.owner(name)][plain]["params"].append(parameter)
    return groups


def make_optimizers(model: MIM, config: Pretrain) -> list[AdamW]:
    """One AdamW for each segment."""
    fused = next(model.parameters()).device.type != "mps"
    return [
        AdamW(groups, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
        for groups in parameter_groups(model)
    ]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Among all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients).div_(dist.get_world_size())
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat, gradients)


def update(
    losses: Callable[[Tensor], Iterator[Tensor]],
    optimizers: list[AdamW],
    batches: Iterable[Float[Tensor, "b c H W"]],
    accum: int = 1,
    clip_grad: float = 0.0,
) -> Float[Tensor, " s"]:
    """One step over ``accum`` batches of normalised images.

    In the last batch each segment steps, and frees its gradients, right after its own backward pass. Among several
    processes its gradients are averaged before, unless DistributedDataParallel has done so.

    Args:
        losses: a `MIM`, bare or in DistributedDataParallel.
        optimizers: one per segment.
        batches: as many as ``accum``.
        accum: batches whose gradients are averaged.
        clip_grad: largest norm of a segment's gradient; 0 is no clipping.

    Returns:
        The loss of each segment, averaged over the batches.
    """
    means: list[Any] = [0.0] * len(optimizers)
    several = dist.is_initialized() and not isinstance(losses, DistributedDataParallel)
    for micro, images in enumerate(batches, start=1):
        last = micro == accum
        apart = isinstance(losses, DistributedDataParallel) and not last
        with losses.no_sync() if apart else contextlib.nullcontext():  # type: ignore[attr-defined]
            for i, loss in enumerate(losses(images)):
                (loss / accum).backward()
                means[i] = means[i] + loss.detach() / accum
                if last:
                    parameters = [p for group in optimizers[i].param_groups for p in group["params"]]
                    if several:
                        average_gradients(parameters)
                    if clip_grad:
                        nn.utils.clip_grad_norm_(parameters, clip_grad)
                    optimizers[i].step()
                    optimizers[i].zero_grad()
    return torch.stack(means)
