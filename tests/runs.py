"""Runs, their folders and their command lines."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanmim.config import Pretrain
from leanmim.factory import build
from leanmim.loop import Stopped
from leanmim.recipes import RECIPES
from leanmim.run import Run, load, save, write_json
from leanmim.train import training
from leanmim.train.pretrain import pretrain


def arguments(config: Pretrain) -> list[str]:
    """What follows `leanmim` on the command line for a configuration: what differs from its recipe."""
    words = ["pretrain", config.recipe, "--data", config.data, "--out", config.out]
    for field in fields(Pretrain):
        value = getattr(config, field.name)
        if field.name in ("recipe", "data", "out") or value == getattr(RECIPES[config.recipe], field.name):
            continue
        option = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [option, *(str(part) for pair in value.items() for part in pair)]
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return words


Refused = Callable[[list[str]], str]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(config: Pretrain) -> list[str]:
    """For a process of its own."""
    return [sys.executable, "-m", "leanmim", *arguments(config)]


def weights(config: Pretrain) -> dict[str, torch.Tensor]:
    return load(Run(Path(config.out)).last)["model"]


def lines(config: Pretrain) -> list[dict]:
    return [json.loads(line) for line in Run(Path(config.out)).metrics.read_text().splitlines()]


def untrained(config: Pretrain, seed: int = 5) -> Path:
    """A run folder of a model before its first step, not of the run's own seed, with a line of metrics."""
    run = Run(Path(config.out))
    torch.manual_seed(seed)
    model = build(config)
    c = config.channels
    state = dict(
        config=config.to_json(), step=0, mean=[0.5] * c, std=[0.25] * c, model=model.state_dict(), optimizers=[]
    )
    write_json(run.config, config.to_json())
    save(run.last, state)
    run.metrics.write_text('{"step": 1}\n')
    return run.folder


def shown(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    """The pictures that TensorBoard has: for each name the steps and the PNG files."""
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    return {name: [(e.step, e.encoded_image_string) for e in board.Images(name)] for name in board.Tags()["images"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def labelled(root: Path, count: int = 3) -> Path:
    """Two colours to tell apart."""
    for part in ("train", "val"):
        for name in ("red", "blue"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (24 + i, 32), name).save(root / part / name / f"{i}.png")
    return root


def noisy_tiles(root: Path, train: int, val: int, size: tuple[int, int] = (16, 16)) -> Path:
    """Noisy tiles of three colours: so many of each to train with, and to validate with."""
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in ("red", "green", "blue"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                colour = np.array(Image.new("RGB", size, name), dtype=float)
                pixels = np.clip(colour + draw.normal(0, 40, colour.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def pretrain_until(config: Pretrain, steps: int) -> None:
    """Pre-train from nothing until so many steps are done and a signal comes."""
    update, done = training.update, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "update", counted)
        pretrain(config)
