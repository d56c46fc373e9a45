"""Strips of pictures over training time, and their figure."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leanmim.config import Pretrain, Show
from leanmim.data import Normalise
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.pictures import show
from leanmim.pictures.over_time import read_strip, write_strip
from leanmim.run import Run
from tests.drawn import Drawn, run_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({"target": "raw-pixels"}, 3),
        ({"target": "hog"}, 4),
        ({"segments": 2, "mask_ratio": 0.75, "throw": 0.5}, 3),
        ({"channels": 5}, 3),
    ],
)
def test_a_strip_leaves_the_model_and_the_generators_as_they_were(
    tiny: Pretrain, tmp_path: Path, changes: dict, columns: int
) -> None:
    config = replace(tiny, **changes)
    c = config.channels
    pictures = torch.rand(2, c, 32, 32) if c == 5 else torch.randint(0, 256, (2, c, 32, 32), dtype=torch.uint8)
    model = build(config).train()
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    normalise = Normalise([0.5] * c, [0.25] * c, CPU)
    assert write_strip(tmp_path / "a.png", config, model, normalise, pictures, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    torch.manual_seed(9)
    assert write_strip(tmp_path / "b.png", config, model, normalise, pictures, 0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    found, rows = read_strip(tmp_path / "a.png")
    assert len(found) == columns and rows == 2
    assert {column.size for column in found} == {(192, 384) if columns == 4 else (32, 64)}
    if c == 3 and columns == 3:
        assert np.array_equal(np.asarray(found[0])[32:], pictures[1].permute(1, 2, 0).numpy())
    assert all(np.asarray(column).std() > 5 for column in found)


def test_a_target_without_reconstruction_leaves_none(tiny: Pretrain, tmp_path: Path) -> None:
    model = build(tiny)
    model.target = object()  # type: ignore[assignment]
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert not write_strip(tmp_path / "a.png", tiny, model, Normalise([0.5] * 3, [0.25] * 3, CPU), images, 0)
    assert not (tmp_path / "a.png").exists()


def test_the_figure_of_the_strips(tiny: Pretrain, drawn: Drawn) -> None:
    folder = run_of(replace(tiny, target="raw-pixels"))
    run = Run(folder)
    with pytest.raises(
        UserError, match="has no pictures over training time; pre-training draws them with --show-every"
    ):
        show(Show(runs=(str(folder),), picture="over-time"))
    for step in (0, 2, 10):
        model = build(tiny)
        images = torch.full((3, 3, 32, 32), step, dtype=torch.uint8)
        write_strip(run.strip(step), tiny, model, Normalise([0.5] * 3, [0.25] * 3, CPU), images, 0)
    assert list(run.strips()) == [0, 2, 10]
    assert show(Show(runs=(str(folder),), picture="over-time", count=2)) == folder / "over-time.png"
    assert drawn.texts == ["original", "masked", "step 0", "step 2", "step 10"]
    assert len(drawn.pictures) == 2 * 5
    with Image.open(folder / "over-time.png") as picture:
        assert picture.format == "PNG"
    for other, message in (
        ({"runs": (str(folder), str(folder))}, "takes one run, not 2"),
        ({"images": ("cat.jpg",)}, "--picture over-time draws what pre-training left"),
        ({"segment": 0}, "--segment is for reconstructions; leave it out with --picture over-time"),
        ({"tiles": 2}, "--tiles is for reconstructions"),
    ):
        with pytest.raises(UserError, match=message):
            show(replace(Show(runs=(str(folder),), picture="over-time"), **other))
    run.strip(2).write_bytes(run.strip(2).read_bytes()[:100])
    with pytest.raises(UserError, match=r"step-2.png' cannot be read as pre-training wrote it .*; remove it"):
        show(Show(runs=(str(folder),), picture="over-time"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)
