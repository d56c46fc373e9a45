"""Where in a step numbers are not finite first."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def finite(values: Any) -> bool:
    """Whether all numbers are, in tensors, tuples, lists and dictionaries of them."""
    return all(bool(value.isfinite().all()) for value in tree_leaves(values) if isinstance(value, Tensor))


def first_not_finite(
    model: nn.Module, losses: Callable[[Any], Iterator[Tensor]], batches: Iterable[Any], seeds: Sequence[int]
) -> str:
    """Repeat the forward and backward passes of a step, and name what is not finite first: the images, the output of a module, a
    loss, or a gradient. Weights, gradients and buffers stay as they are.

    Args:
        model: whose modules are watched.
        losses: from a batch to the losses of the segments.
        batches: of the step.
        seeds: for each batch, as for `update`.

    Returns:
        Its name for people to read; empty if all is finite when the step is repeated.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and not finite(output):
                found.append(f"the output of {name}")

        return look

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # in compiled code nobody is asked
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(watch(name)).remove)
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            if not finite(batch):
                found.append("the input images")
            for i, loss in enumerate(losses(batch)):
                if not found and not finite(loss):
                    found.append(f"the loss of segment {i}")
                if found:
                    break
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                bad = [name for name, own in zip(parameters, gradients, strict=True) if not finite(own)]
                if bad:  # the pass goes backwards
                    found.append(f"the gradient of {bad[-1]}")
                    break
    for buffer, before in buffers:
        buffer.copy_(before)
    return "".join(found[:1])


def running_statistics(*parts: nn.Module | nn.Parameter) -> list[Tensor]:
    """The running statistics of batch norms: what a forward pass changes, and a step that is skipped must not."""
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def undo(values: list[Tensor], before: list[Tensor], losses: Tensor) -> None:
    """Give values back what they were before, if a loss is not finite; nobody waits for the device."""
    good = losses.isfinite().all()
    for value, old in zip(values, before, strict=True):
        value.copy_(torch.where(good, value, old))
