"""leanmim: masked image modelling that fits the hardware people have.

    from dataclasses import replace
    import leanmim
    leanmim.pretrain(replace(leanmim.MAE, data="photos", out="run", model="vit_tiny_patch16_224"))

For a loop of one's own: ``model = leanmim.build(leanmim.MAE)``, then ``for loss in model.losses(images): ...``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> module; imported when first asked for, so that `leanmim --help` does not wait for torch
_PLACES = {
    "pretrain": "train",
    "knn": "evaluate.knn",
    "probe": "evaluate.probe",
    "build": "mim",
    "MIM": "mim",
    "MAE": "recipes",
    "SIMMIM": "recipes",
    "FASTMIM": "recipes",
    "FASTMIM_P": "recipes",
    "PR_MIM": "recipes",
    "BIM": "recipes",
    "Cost": "config",
    "Plan": "config",
    "RECIPES": "recipes",
    "restore": "checkpoint",
    "load_backbone": "checkpoint",
    "Pretrain": "config",
    "Knn": "config",
    "Probe": "config",
    "Show": "config",
    "Export": "config",
    "Report": "config",
    "UserError": "errors",
}
__all__ = ["__version__", *_PLACES]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'leanmim' has no attribute {name!r}")
    return getattr(import_module(f"leanmim.{_PLACES[name]}"), name)
