"""FastMIM-P: the input size grows during training, and nothing that was learned is lost."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.run import Run, load, save
from leanmim.train.pretrain import pretrain
from leanmim.weights import load_backbone, restore
from tests.helpers import GROWING, growing, throwing


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"phase_starts": (0.0,)}, "1 numbers for 2"),
        ({"phase_starts": (0.1, 0.5)}, "begin with 0"),
        ({"phase_starts": (0.0, 1.0)}, "stay under 1"),
        ({"phase_batches": (8,)}, "--phase-batches"),
        ({"phase_accums": (1, 0)}, "--phase-accums"),
        (
            {"epochs": 0.25},
            "0.25 epochs, of 2 steps each, are too few for phases at 0, 0.5 of them: one would be empty",
        ),
        ({"phase_scales": (1.0, 1.1)}, "not divided by"),
        ({"phase_batches": (8, 64)}, "choose --batch-size"),
        ({"batch_size": "auto"}, "leave those of the phases out"),
    ],
)
def test_what_cannot_be(tiny: Pretrain, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(growing(tiny, **wrong))
    assert not Path(tiny.out).exists()


def test_each_phase_has_its_size_batch_and_rate(tiny: Pretrain) -> None:
    pretrain(growing(tiny, phase_blrs=(1e-2, 3e-2)))
    lines = [json.loads(line) for line in Run(Path(tiny.out)).metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9)]  # 16 images: 2 steps of 8 an epoch, either way
    assert [line["epoch"] for line in lines] == [0.5 * step for step in range(1, 9)]
    quarter = [line["lr"] for line in lines]
    assert quarter[4] / quarter[3] > 1.5  # three times the base rate, at half the cosine
    config, model, _ = restore(tiny.out)
    assert config.size == (64, 64)
    assert model.encoder.grid == (8, 8)


def test_the_loss_goes_on_where_it_was(tiny: Pretrain) -> None:
    """The same images at twice the size: a model that has learned does better than one that has not, at once."""
    config = growing(tiny, epochs=40, phase_starts=(0.0, 0.9), phase_scales=(1.0, 2.0), blr=2e-2)
    pretrain(config)
    lines = [json.loads(line) for line in Run(Path(tiny.out)).metrics.read_text().splitlines()]
    first, last, after = lines[0]["loss"], lines[71]["loss"], lines[72]["loss"]
    assert last < first
    assert after - last < 0.5 * (first - last)


@pytest.mark.parametrize(("stop", "name"), [(2, "vit"), (4, "vit"), (5, "vit"), (5, "swin")])
def test_stopped_in_any_phase_and_continued_ends_alike(
    tiny: Pretrain, tmp_path: Path, name: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 4 are the first phase, 5 to 8 the second; 4 is its border."""
    config = growing(tiny, name, checkpoint_minutes=0.0)
    pretrain(config)
    whole = load(Run(Path(config.out)).last)

    class Stopped(Exception):
        pass

    def save_and_stop(path: Path, state: dict, keep: int) -> None:
        save(path, state, keep)
        if state["step"] == stop:
            raise Stopped

    config = replace(config, out=str(tmp_path / "other"))
    monkeypatch.setattr("leanmim.run.save", save_and_stop)
    with pytest.raises(Stopped):
        pretrain(config)
    monkeypatch.setattr("leanmim.run.save", save)
    pretrain(config)
    again = load(Run(Path(config.out)).last)
    assert again["step"] == whole["step"] == 8
    assert all(torch.equal(value, again["model"][key]) for key, value in whole["model"].items())
    for key, value in whole["optimizers"][0]["state"].items():
        assert all(torch.equal(value[part], again["optimizers"][0]["state"][key][part]) for part in value)


@pytest.mark.results
@pytest.mark.parametrize("name", GROWING)
def test_what_comes_out_loads_in_timm_at_its_size_and_a_larger_one(tiny: Pretrain, name: str) -> None:
    pretrain(growing(tiny, name))
    config, model, state = restore(tiny.out)
    assert state["phase"] == 1
    backbone, _, _ = load_backbone(tiny.out, (128, 128))
    assert backbone.forward_features(torch.randn(1, 3, 128, 128)).isfinite().all()
    file = Path(tiny.out) / "export" / "timm" / "model.safetensors"
    arguments = json.loads((file.parent / "config.json").read_text())["model_args"]
    loaded = timm.create_model(config.model, num_classes=0, checkpoint_path=str(file), **arguments).eval()
    images = torch.randn(2, 3, *config.size)
    assert torch.equal(loaded.forward_features(images), model.eval().encoder.backbone.forward_features(images))
    # a size of one's own, window tables and positions resized by timm
    size = {"img_size": 96} if name != "pvt" else {}
    other = timm.create_model(
        config.model, pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(file=str(file), num_classes=0),
        **{**arguments, **size},
    )  # fmt: skip
    assert other(torch.randn(1, 3, 96, 96)).shape == (1, 5)


# With other methods.


def test_phases_throw_the_same_share(tiny: Pretrain) -> None:
    pretrain(throwing(tiny))
    lines = [json.loads(line) for line in Run(Path(tiny.out)).metrics.read_text().splitlines()]
    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_phase_that_cannot_throw_is_an_error_before_training(tiny: Pretrain) -> None:
    """32 px are 16 patches; half the size is 4, of which 1 is visible, and 0.2 of 4 is less than one."""
    config = throwing(tiny, phase_scales=(0.5, 1.0), throw=0.2)
    with pytest.raises(UserError, match=r"--throw 0\.2 is 0 of all 4 patches"):
        pretrain(config)
    assert not Path(tiny.out).exists()
