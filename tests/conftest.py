"""Tiny models and the photos that the project ships: no network, no GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.recipes import MAE, SIMMIM

PHOTOS = Path(__file__).parent.parent / "demo" / "photos"

torch.set_num_threads(1)  # xdist runs one test a core

TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture
def photos() -> Path:
    return PHOTOS


@pytest.fixture
def tiny(tmp_path: Path) -> Pretrain:
    """A MAE that trains in about a second."""
    return replace(
        MAE,
        data=str(PHOTOS),
        out=str(tmp_path / "run"),
        model="vit_tiny_patch16_224",
        model_kwargs=TINY_VIT,
        input_size=(32,),
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
        epochs=2,
        batch_size=4,
        workers=0,
        device="cpu",
        log_every=1,
    )


@pytest.fixture
def tiny_simmim(tiny: Pretrain) -> Pretrain:
    """A SimMIM that trains in about a second."""
    return replace(
        SIMMIM,
        **{
            name: getattr(tiny, name)
            for name in (
                "data",
                "out",
                "model",
                "model_kwargs",
                "epochs",
                "batch_size",
                "workers",
                "device",
                "log_every",
            )
        },
        input_size=(64,),
        mask_unit=16,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that no core waits for it at the end."""
    items.sort(key=lambda item: "the_readmes_commands" not in item.nodeid)
