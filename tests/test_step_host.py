"""A step never makes the host wait for the device: nothing is copied between them but what was copied once and kept.

Emulated: fake tensors on a CUDA device that need not be there. Autograd cannot run on those, so the backward pass is left out; that
it reads no value is what `costs.count` shows with every step it counts, since fake tensors have none.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanmim.config import Pretrain
from leanmim.costs.counting import with_state
from leanmim.data import Normalise
from leanmim.encoders.backbone import Backbone, backbone_of
from leanmim.factory import build
from leanmim.fake import fake_tensors
from leanmim.mim import MIM
from leanmim.recipes import BIM, FASTMIM, MAE, SIMMIM
from leanmim.step import make_optimizers, update
from leanmim.targets import with_levels
from tests import fake_cuda
from tests.helpers import small

CUDA = torch.device("cuda")


class SpelledOut(TorchFunctionMode):
    """Attention by its formula: torch chooses a kernel by the device, which is not there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            return (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return func(*args, **(kwargs or {}))


class Crossings(TorchDispatchMode):
    """Writes down the operators that make the host wait: those that return a number, and copies that are not of one number,
    which a kernel takes as its argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if len({x.device.type for x in tensors if x.ndim or copies}) > 1 or "scalar_dense" in str(func):
            self.found.append(str(func))
        return result


def on_cuda(config: Pretrain, backbone: Backbone) -> tuple[MIM, list[AdamW]]:
    """Fake."""
    with CUDA:
        model = build(config, backbone.to_empty(device=CUDA)).train()
        model.target = with_levels(model.target, config.read_as, [0.5] * 3, [0.5] * 3)
        return model, with_state(make_optimizers(model, config), model)


@fake_cuda.needed
@pytest.mark.parametrize(
    "config",
    [
        small(MAE),
        small(BIM, segments=2, mask_ratio=(0.5, 0.75), throw=0.25, fill=1, clip_grad=1.0),
        small(FASTMIM, mask_unit=4),
        small(SIMMIM, mask_unit=16),
    ],
    ids=["mae", "nested masks and thrown patches", "hog in fine masks", "tokens"],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_the_host_does_not_wait_for_the_device(config: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(config, config.depth, device="meta")
    with fake_tensors():
        model, optimizers = on_cuda(config, backbone)

        def backward(loss: Tensor) -> None:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        monkeypatch.setattr(Tensor, "backward", backward)
        normalise = Normalise([0.5] * 3, [0.5] * 3, CUDA)
        images = torch.zeros(2, 3, *config.size, dtype=torch.uint8, device=CUDA)
        found = []
        for _ in range(2):
            crossings = Crossings()
            with SpelledOut(), crossings:
                update(model, optimizers, (normalise(images) for _ in range(2)), 2, config.clip_grad)
            found.append(crossings.found)
        with Crossings() as crossings:
            torch.ones(2).to(CUDA)
    assert len(crossings.found) == 1  # as it must
    assert not found[1]  # tables are copied in the first step, and kept
