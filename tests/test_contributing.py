"""Every example of CONTRIBUTING.md is a file that trains what it adds, and its run can be restored."""

import re
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import leanmim

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"^### A (\w+)\n[^#]*?^```python\n(.*?)^```", GUIDE, re.M | re.S))
SMALL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "input_size": (32,),
    "decoder_depth": 1,
    "decoder_width": 32,
    "decoder_heads": 2,
    "epochs": 1,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where an example runs, with the images that it names; what it adds to the tables is taken out again."""
    shutil.copytree(ROOT / "demo" / "photos", tmp_path / "photos")
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 48, 3), dtype=np.uint8)
    np.save(tmp_path / "photos.npy", images)
    monkeypatch.chdir(tmp_path)
    train = leanmim.pretrain
    monkeypatch.setattr(leanmim, "pretrain", lambda config: train(replace(config, **SMALL)), raising=False)
    tables = [leanmim.TARGETS, leanmim.MASKINGS, leanmim.RECIPES]
    before, sources = [dict(table) for table in tables], list(leanmim.SOURCES)
    yield tmp_path
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
    leanmim.SOURCES[:] = sources


def run(example: str, place: Path) -> dict[str, Any]:
    """The names that an example defines, after it ran as a file."""
    file = place / "example.py"
    file.write_text(EXAMPLES[example])
    return runpy.run_path(str(file), run_name="__main__")


def test_the_guide_has_these_examples() -> None:
    assert list(EXAMPLES) == ["target", "masking", "source", "recipe"]
    assert GUIDE.count("```python") == len(EXAMPLES)


def test_a_target(place: Path) -> None:
    names = run("target", place)
    config, model, _ = leanmim.restore("run")
    assert config.target == "laplacian" and type(model.target).__name__ == names["Laplacian"].__name__
    flat = torch.full((1, 3, 32, 32), 2.0)
    assert model.target(flat).abs().max() == 0
    flat[0, 0, 9, 9] += 4
    target = model.target(flat).view(16, 8, 8, 3)  # patches, their rows, columns and channels
    assert target[5, 1, 1, 0] == 4 and target[5, 1, 0, 0] == target[5, 0, 1, 0] == -1


def test_a_masking(place: Path) -> None:
    names = run("masking", place)
    config, model, _ = leanmim.restore("run")
    assert config.masking == "noise" and type(model.encoder) is names["NoiseEncoder"]
    images = torch.zeros(1, 3, 32, 32)
    (mask,) = model.draw_masks(images)
    painted = model.encoder.embed(images, mask)
    assert (painted != 0).float().mean() == mask.masked.shape[1] / 16 == 0.75


def test_a_source(place: Path) -> None:
    run("source", place)
    config, model, state = leanmim.restore("run")
    assert config.data == str(place / "photos.npy") and state["step"] == 2  # 8 images in batches of 4
    assert all(torch.isfinite(loss) for loss in model.losses(torch.zeros(1, 3, 32, 32)))


def test_a_recipe(place: Path) -> None:
    names = run("recipe", place)
    config, model, _ = leanmim.restore("run")
    assert config.recipe == "thrifty" and leanmim.RECIPES["thrifty"] is names["THRIFTY"]
    assert len(model.decoders) == 2 and model.throw == 0.25
