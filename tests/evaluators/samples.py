"""Labelled tiles of three colours, clusters of features."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from leanmim.config import Pretrain
from leanmim.evaluators.features import Features

CPU = torch.device("cpu")


COLOURS = ("red", "green", "blue")


# Python 3.12 warns of every fork of a process that has threads
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def clusters(n: int, classes: int, spread: float, seed: int, width: int = 16) -> Features:
    """Points around one centre for each class; the centres are always the same."""
    centres = np.random.default_rng(0).normal(size=(classes, width))
    draw = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = centres[y] + draw.normal(0, spread, (n, width))
    return Features(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def swin(tiny_simmim: Pretrain, **more: object) -> Pretrain:
    """The smallest Swin whose heads divide its width."""
    return replace(
        tiny_simmim, model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, mask_unit=32, **more
    )
