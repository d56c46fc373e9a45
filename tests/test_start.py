"""What fine-tuning and embedding start from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from leanmim import published as published_module
from leanmim import start as start_module
from leanmim.config import Export, Pretrain
from leanmim.config.base import Images
from leanmim.errors import UserError
from leanmim.formats import export
from leanmim.start import open_start
from leanmim.weights import load_backbone
from tests.helpers import PLAIN, SWIN
from tests.runs import untrained

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def same(one: Any, other: Any, size: int = 32) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one(images), other(images))


def test_a_run_is_its_encoder(tiny: Pretrain) -> None:
    folder = str(untrained(tiny))
    start = open_start(folder)
    assert (start.model.model, start.model.input_size, start.model.channels) == (tiny.model, (32,), 3)
    assert start.masked and start.pretrained is not None
    assert start.mean == [0.5] * 3
    same(start.encoder(), load_backbone(folder)[0])
    same(start.encoder((48, 48)), load_backbone(folder, (48, 48))[0], 48)
    same(open_start(str(Path(folder) / "checkpoints" / "last.pt")).encoder(), start.encoder())


def test_an_export_is_the_same_encoder(tiny: Pretrain) -> None:
    folder = str(untrained(tiny))
    exported = str(export(Export(run=folder)))
    for name in (exported, f"local-dir:{exported}"):
        start = open_start(name)
        assert start.masked and start.pretrained is None
        same(start.encoder(), open_start(folder).encoder())


def test_a_shallower_model_of_a_run_in_segments(tiny: Pretrain) -> None:
    folder = str(untrained(replace(tiny, segments=2)))
    start = open_start(folder, depth=2)
    assert start.model.model_kwargs["depth"] == 2
    same(start.encoder(), load_backbone(folder, depth=2)[0])
    with pytest.raises(UserError, match="--depth 3: the segments of this run end at 2, 4"):
        open_start(folder, depth=3)


def test_a_run_without_its_last_layers_names_the_whole_model(tiny: Pretrain) -> None:
    start = open_start(str(untrained(replace(tiny, depth=2))))
    assert start.weights is not None
    assert "depth" not in start.model.model_kwargs or start.model.model_kwargs["depth"] == PLAIN["depth"]
    assert not any(key.startswith("blocks.2.") for key in start.weights)


def test_scratch_depends_on_the_seed_only() -> None:
    start = open_start("scratch", model="vit_tiny_patch16_224", model_kwargs=PLAIN, input_size=(32,))
    assert start.weights is None and start.masked
    same(start.encoder(seed=1), start.encoder(seed=1))
    with pytest.raises(AssertionError):
        same(start.encoder(seed=1), start.encoder(seed=2))


def test_a_checkpoint_file_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, **PLAIN)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    start = open_start(
        str(tmp_path / "w.safetensors"), model="vit_tiny_patch16_224", model_kwargs=PLAIN, input_size=(32,)
    )
    assert not start.masked
    model.reset_classifier(0)
    same(start.encoder(), model.eval())
    with pytest.raises(UserError, match="give --model"):
        open_start(str(tmp_path / "w.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        open_start(str(tmp_path / "bad.safetensors"), model="vit_tiny_patch16_224")


def test_published_weights_have_their_own_statistics_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def without_network(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        assert pretrained
        torch.manual_seed(0)
        return create(name, **arguments)

    monkeypatch.setattr(published_module.timm, "create_model", without_network)
    start = open_start("vit_tiny_patch16_224.augreg_in21k")
    assert start.model.model == "vit_tiny_patch16_224" and start.model.input_size == (224, 224)
    assert start.mean == [0.5, 0.5, 0.5]  # not ImageNet's
    assert start.origin == "vit_tiny_patch16_224.augreg_in21k" and not start.masked
    monkeypatch.undo()
    assert start.encoder((32, 32))(IMAGE).shape == (2, 192)


def test_only_the_first_blocks_of_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **PLAIN)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    file, own = (
        str(tmp_path / "w.safetensors"),
        dict(model="vit_tiny_patch16_224", model_kwargs=PLAIN, input_size=(32,)),
    )
    encoder = open_start(file, **own, depth=2).encoder()  # type: ignore[arg-type]
    assert len(encoder.blocks) == 2
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


def test_a_swin_at_another_size_has_another_window(tiny_simmim: Pretrain) -> None:
    name, kwargs = SWIN
    run = str(untrained(replace(tiny_simmim, model=name, model_kwargs=kwargs, input_size=(64,), mask_unit=32)))
    start = open_start(str(export(Export(run=run))))
    assert "window_size" not in start.model.model_kwargs
    same(start.encoder(), open_start(run).encoder(), 64)
    same(start.encoder((128, 128)), open_start(run).encoder((128, 128)), 128)


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        ("nowhere", {}, "no such file or run folder"),
        ("empty", {}, "neither a run folder with a checkpoint"),
        ("scratch", {}, "give --model"),
        ("scratch", {"model": "vit_tiny_patch99"}, "timm has no model"),
        ("scratch", {"model": "resnet18", "depth": 1}, "timm does not build resnet18 shorter"),
        ("described", {}, "is not timm's description"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, start: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "described").mkdir()
    (tmp_path / "described" / "config.json").write_text(json.dumps({"a": 1}))
    save_file({"a": torch.zeros(1)}, tmp_path / "described" / "model.safetensors")
    path = tmp_path / start
    with pytest.raises(UserError, match=message):
        open_start(str(path) if path.exists() else start, **options)


def test_an_architecture_or_channels_of_its_own(tiny: Pretrain) -> None:
    folder = str(untrained(tiny))
    with pytest.raises(UserError, match="leave --model and --model-kwargs out"):
        open_start(folder, model="vit_tiny_patch16_224")
    with pytest.raises(UserError, match="leave --channels out"):
        open_start(folder, images=Images(channels=1))


def test_a_named_checkpoint_is_the_one_that_is_read(tiny: Pretrain, tmp_path: Path) -> None:
    """Not the newest one of the run; also of a run without its last layers."""
    folder = untrained(replace(tiny, depth=2))
    earlier = folder / "checkpoints" / "earlier.pt"
    earlier.write_bytes((folder / "checkpoints" / "last.pt").read_bytes())
    expected = open_start(str(folder)).encoder()
    untrained(replace(tiny, depth=2), seed=9)
    same(open_start(str(earlier)).encoder(), expected)
    copy = tmp_path / "copy.pt"
    copy.write_bytes(earlier.read_bytes())
    same(open_start(str(copy)).encoder(), expected)


def test_a_depth_that_the_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--depth 9 is out of range; vit_tiny_patch16_224 has 4 blocks or stages"):
        open_start("scratch", model="vit_tiny_patch16_224", model_kwargs=PLAIN, input_size=(32,), depth=9)


def test_torchs_own_file_with_an_architecture(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **PLAIN)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    start = open_start(str(tmp_path / "w.pt"), model="vit_tiny_patch16_224", model_kwargs=PLAIN, input_size=(32,))
    same(start.encoder(), model.eval())


def test_weights_know_whether_they_are_the_same(tiny: Pretrain, tmp_path: Path) -> None:
    one, other = untrained(tiny), untrained(replace(tiny, out=str(tmp_path / "b")), seed=6)
    digests = [open_start(str(folder)).digest for folder in (one, one, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("tag", "masked"), [("mae", True), ("augreg_in21k", False), ("mae_in1k_ft_in1k", False)])
def test_published_weights_that_labels_never_saw_are_masked(
    monkeypatch: pytest.MonkeyPatch, tag: str, masked: bool
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    name = f"vit_tiny_patch16_224.{tag}"
    monkeypatch.setattr(start_module, "published_model", lambda *_: (model, name))
    assert open_start(name).masked == masked
