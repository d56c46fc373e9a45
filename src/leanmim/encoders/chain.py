"""Which modules a backbone runs one after the other: only such a chain can be cut into segments."""

from typing import Any

import torch
from torch import Tensor

from leanmim.encoders.backbone import Backbone
from leanmim.errors import UserError


def run_once(
    backbone: Backbone, input_size: tuple[int, int], channels: int, remedy: str
) -> tuple[Tensor, dict[str, int]]:
    """The features of an empty image, and the modules that made them, one after the other (`Calls.chain`).

    From then on only those parameters are trained on which the features depend.

    Raises:
        UserError: the backbone does not take the size (with the ``remedy``), or its features are not one grid.
    """
    name, was_training = type(backbone).__name__, backbone.training
    backbone.eval()  # an empty image is none that running statistics should learn from
    with torch.enable_grad(), Calls(backbone) as calls:
        try:
            features = backbone.forward_features(torch.zeros(1, channels, *input_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"{name} does not run at input size {input_size}: {error}; {remedy}") from error
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise UserError(f"{name} cannot be masked in pixel space: its features are not one grid of patches")
        features.sum().backward()
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    backbone.train(was_training)
    return features, calls.chain(features)


class Calls:
    """Watches which modules a backbone runs, one after the other: its children, and those of the stages' container.

    Args:
        backbone: a timm model.
    """

    def __init__(self, backbone: Backbone) -> None:
        stages = [part["module"] for part in getattr(backbone, "feature_info", [])]
        inside = {name for name, _ in backbone.named_modules()}  # not all that timm names there is
        parents = {name.rpartition(".")[0] for name in stages if name in inside} - {""}
        children = [name for name, _ in backbone.named_children() if name not in parents]
        children += [f"{parent}.{name}" for parent in parents for name, _ in
                     backbone.get_submodule(parent).named_children()]  # fmt: skip
        self.modules = {name: backbone.get_submodule(name) for name in children}
        self.calls: list[tuple[str, Any, Any]] = []  # name, input, output

    def __enter__(self) -> "Calls":
        """Begin to watch."""
        self.hooks = [
            module.register_forward_hook(lambda _, x, y, name=name: self.calls.append((name, x[0] if x else None, y)))
            for name, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer."""
        for hook in self.hooks:
            hook.remove()

    def chain(self, result: Tensor) -> dict[str, int]:
        """The modules in their order and the dimensions of what each returns, if each one's input is the output of the one
        before, and the last one's output is ``result``; else none.
        """
        chained = all(y is x for (_, _, y), (_, x, _) in zip(self.calls, self.calls[1:], strict=False))
        chained = chained and bool(self.calls) and self.calls[-1][2] is result
        return {name: y.ndim for name, _, y in self.calls} if chained else {}
