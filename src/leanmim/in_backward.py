"""Optimizer steps of one parameter at a time, and in the backward pass: a gradient is freed as soon as it has arrived."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer


def trained_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimizer, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def only(optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any]) -> Iterator[None]:
    """Context in which the optimizer has one parameter, of one of its groups."""
    groups, optimizer.param_groups = optimizer.param_groups, [{**group, "params": [parameter]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def step_if(optimizer: Optimizer, good: Bool[Tensor, ""]) -> None:
    """Step if ``good``. Where AdamW is fused the device decides, and nobody waits for it: ``found_inf`` is how torch's
    GradScaler has it leave weights, moments and number of steps as they are.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = 1 - good.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif isinstance(good, FakeTensor) or good:  # what is only counted is good
        optimizer.step()


class InBackward:
    """Context of a backward pass in which each parameter is stepped as soon as its gradient has arrived, which is then freed.

    So gradients of one parameter or a few live at a time. The weights become those of a step after the backward pass, bit for
    bit on a CPU. A loss that is not finite steps nothing. From the first gradient on that is not finite no further parameter is
    stepped; those before it have been.

    Args:
        optimizer: of all parameters that the loss depends on.
        loss: whose backward pass it is.
    """

    def __init__(self, optimizer: Optimizer, loss: Float[Tensor, ""]) -> None:
        self.optimizer, self.good = optimizer, loss.detach().isfinite()
        self.groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}

    def __enter__(self) -> "InBackward":
        """Listen to gradients."""
        self.hooks = [parameter.register_post_accumulate_grad_hook(self.step) for parameter in self.groups]
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no longer."""
        for hook in self.hooks:
            hook.remove()

    def step(self, parameter: nn.Parameter) -> None:
        """Step a parameter whose gradient is there."""
        assert parameter.grad is not None
        self.good = self.good & parameter.grad.isfinite().all()
        with only(self.optimizer, parameter, self.groups[parameter]):
            step_if(self.optimizer, self.good)
        parameter.grad = None
