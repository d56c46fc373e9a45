"""Activation checkpointing: the same losses and gradients, blocks that run twice."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.placement import place
from leanmim.recipes import FASTMIM
from leanmim.recompute import checkpoint_blocks
from tests.helpers import CONVNEXT, KINDS, images_of, small

END_TO_END = {
    "vit": small(model_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}),
    "convnext": small(FASTMIM, CONVNEXT, input_size=(64,)),
}
IN_SEGMENTS = {name: KINDS[name] for name in ("vit, drop", "swin, pixel")}


def trained(config: Pretrain) -> tuple[list[Tensor], list[Tensor | None], Counter[str]]:
    """Losses, gradients, and how often each block was run."""
    torch.manual_seed(0)
    model, runs = build(config), Counter[str]()
    place(model, [], config, torch.device("cpu"))
    for name, module in model.named_modules():
        if type(module).__name__ in ("Block", "SwinTransformerBlock", "ConvNeXtBlock"):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    torch.manual_seed(1)
    losses = []
    for loss in model.losses(images_of(config)):
        loss.backward()
        losses.append(loss.detach())
    return losses, [p.grad for p in model.parameters()], runs


@pytest.mark.parametrize("config", [*END_TO_END.values(), *IN_SEGMENTS.values()], ids=[*END_TO_END, *IN_SEGMENTS])
def test_gradients_are_the_same_and_every_block_runs_twice(config: Pretrain) -> None:
    losses, gradients, runs = trained(config)
    again, same, twice = trained(replace(config, checkpointing=True))
    assert all(map(torch.equal, losses, again))
    for one, other in zip(gradients, same, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert runs and twice == Counter({name: 2 * count for name, count in runs.items()})


def test_what_cannot_be_run_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"ResNet's batch norms would be updated twice; leave --checkpointing out"):
        trained(small(FASTMIM, ("resnet10t", {}), input_size=(64,), checkpointing=True))
    with pytest.raises(UserError, match=r"timm's Linear has no activation checkpointing .* choose another --model"):
        checkpoint_blocks(SimpleNamespace(backbone=nn.Linear(2, 2)), [])
