"""Fine-tuned runs without fine-tuning."""

from pathlib import Path
from typing import Any

import torch
from timm import create_model
from torch import nn

from leanmim.config.base import Model
from leanmim.config.finetune import Finetune
from leanmim.run import Run, save, write_json
from tests.helpers import PLAIN

CLASSES = ("cat", "sheep", "blue macaw")


WINDOWED = {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": (64, 96), "window_size": (2, 3)}


CLASSIFIERS: dict[str, tuple[Model, dict[str, Any]]] = {  # and what makes it in timm
    "vit": (
        Model(model="vit_tiny_patch16_224", model_kwargs={**PLAIN, "global_pool": "avg"}, input_size=(32,)),
        {**PLAIN, "global_pool": "avg", "img_size": 32},
    ),
    "vit, class token, grey, wide": (
        Model(model="vit_tiny_patch16_224", model_kwargs=PLAIN, input_size=(32, 48), channels=1),
        {**PLAIN, "img_size": (32, 48), "in_chans": 1},
    ),
    "swin, wide": (
        Model(
            model="swin_tiny_patch4_window7_224",
            model_kwargs={"embed_dim": 24, "depths": [1, 1, 1, 1]},  # type: ignore[dict-item]
            input_size=(64, 96),
        ),
        WINDOWED,
    ),
    "convnext, grey": (Model(model="convnext_atto", input_size=(64,), channels=1), {"in_chans": 1}),
    "pvt": (Model(model="pvt_v2_b0", input_size=(64,)), {}),
}


def finetuned(name: str, folder: Path, crop: float | None = None) -> nn.Module:
    """A run folder with random weights, as if fine-tuned; the classifier, made by timm alone."""
    own, arguments = CLASSIFIERS[name]
    torch.manual_seed(3)
    model = create_model(own.model, num_classes=len(CLASSES), **arguments).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = Finetune(start="scratch", data="-", out=str(folder), recipe="small", epochs=3, crop=crop).to_json()
    write_json(Run(folder).config, config)
    state = {
        "config": config, "step": 7, "architecture": own.to_json(), "classes": list(CLASSES),
        "mean": [0.4] * own.channels, "std": [0.2] * own.channels, "model": model.state_dict(),
    }  # fmt: skip
    save(Run(folder).last, state)
    return model


def images_for(name: str, batch: int = 2) -> torch.Tensor:
    own, _ = CLASSIFIERS[name]
    return torch.randn(batch, own.channels, *own.size, generator=torch.Generator().manual_seed(0))
