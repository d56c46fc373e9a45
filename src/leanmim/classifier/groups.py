"""Layer-wise learning-rate decay (BEiT, arXiv 2106.08254; MAE, table 9): the lower a layer, the smaller its steps.

Layer 0 is all before the first block: stem, class token, positions. Blocks count from 1, over all stages of a hierarchical
model; what lies between two blocks (downsampling) belongs to the one before it. The last norm and the head come last.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from leanmim.encoders.backbone import Backbone
from leanmim.step import vectors


def blocks_in(module: nn.Module) -> list[nn.Module]:
    """The blocks of a stage, a list of stages or a list of blocks; a block alone is its own."""
    inner = getattr(module, "blocks", module)
    if isinstance(inner, nn.Sequential | nn.ModuleList):
        return [block for child in inner for block in blocks_in(child)]
    return [module]


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    """The blocks of a timm model, in order: those of a ViT, or those of all stages."""
    if hasattr(backbone, "blocks"):
        found = blocks_in(backbone)
    else:
        modules = dict(backbone.named_modules())
        stages: Iterable[str] = (stage["module"] for stage in backbone.feature_info)
        found = [block for name in stages if name in modules for block in blocks_in(modules[name])]
    return [block for block in found if any(True for _ in block.parameters())]


def layer_numbers(backbone: Backbone) -> tuple[dict[nn.Parameter, int], int]:
    """The layer of each parameter, from 0; and the number of the last, the head's.

    timm registers a model's parts in the order in which they run: a parameter outside of the blocks has the number of the
    block before it.
    """
    blocks = blocks_of(backbone)
    own = {parameter: number for number, block in enumerate(blocks, start=1) for parameter in block.parameters()}
    number, numbers = 0, {}
    for parameter in backbone.parameters():
        # what comes after the last block is the head's
        number = own.get(parameter, len(blocks) + 1 if number >= len(blocks) else number)
        numbers[parameter] = number
    return numbers, len(blocks) + 1


def decayed_groups(backbone: Backbone, decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups, of two a layer at most: with weight decay and without (`leanmim.step`).

    Each has an ``lr_scale``, ``decay`` to the power of the layers above it.

    Args:
        backbone: a timm model with its head.
        decay: layer decay; 1 is none.
    """
    exempt = vectors(backbone, backbone)
    numbers, last = layer_numbers(backbone)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter, number in numbers.items():
        if parameter.requires_grad:
            groups.setdefault((number, parameter in exempt), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": decay ** (last - number)} | ({"weight_decay": 0.0} if vector else {})
        for (number, vector), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
