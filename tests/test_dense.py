"""A pyramid has the weights of its start and maps of four strides; other libraries load the maps of an export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN

import leanmim
from leanmim.config import Export, Pretrain
from leanmim.dense import Pyramid
from leanmim.errors import UserError
from leanmim.formats import export, write_export
from leanmim.recipes import FASTMIM
from leanmim.run import Run, load, save
from leanmim.weights import load_backbone
from tests.formats.classifiers import finetuned, images_for
from tests.helpers import PLAIN, equal, fake_run

smp = pytest.importorskip("segmentation_models_pytorch")
transformers = pytest.importorskip("transformers")

PATCHES = {**PLAIN, "patch_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", PATCHES),
    "vit, patches of 8": ("vit_tiny_patch16_224", PATCHES | {"patch_size": 8}),
    "vit, patches of 32": ("vit_tiny_patch16_224", PATCHES | {"patch_size": 32}),
    "vit, registers": ("vit_medium_patch16_reg4_gap_256", PATCHES),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1, 2, 1]}),
    "swin v2": ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": [1, 1, 2, 1]}),
    "pvt": ("pvt_v2_b0", {"depths": [1, 1, 1, 1]}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}),
}
HIERARCHICAL = [name for name in FAMILIES if "vit" not in name]


def run_of(name: str, folder: Path, **changes: Any) -> Pretrain:
    """A run with random weights, those that are no parameters too: a library may set the statistics of batch norms back."""
    model, arguments = FAMILIES[name]
    own = {"model": model, "model_kwargs": arguments, "input_size": (64,), "device": "cpu"} | changes
    config = fake_run(replace(FASTMIM, data="-", **own), folder)
    state = load(Run(folder).last)
    for key, value in state["model"].items():
        if key.endswith(("running_mean", "running_var")):
            value += torch.rand_like(value)
    save(Run(folder).last, state)
    return config


def own_maps(run: str, images: Tensor) -> list[Tensor]:
    backbone = load_backbone(run)[0]
    with torch.inference_mode():
        return backbone.forward_intermediates(images, intermediates_only=True)


def assert_loaded(module: nn.Module, run: str) -> None:
    """Every weight is the encoder's, by its name behind whatever prefix; only head and last norm may be left."""
    own = load_backbone(run)[0].state_dict()
    plain = {name.replace("_", "."): value for name, value in own.items()}  # timm joins the names of stages by "_"
    for name, value in module.state_dict().items():
        words = name.replace("_", ".").split(".")
        key = next(key for i in range(len(words)) if (key := ".".join(words[i:])) in plain)
        assert torch.equal(value, plain.pop(key)), name
    assert all(name.startswith(("norm.", "fc.norm.", "head.")) for name in plain), plain.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pyramid_of_any_family_and_size(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path / "run")
    folder = export(Export(run=run.out))
    for start in (run.out, folder):
        pyramid = leanmim.pyramid(start, out_channels=12, pool=True)
        assert pyramid.training and pyramid.out_channels == 12
        assert pyramid.mean == [0.4] * 3 and pyramid.std == [0.2] * 3
        inner = pyramid.backbone.state_dict()
        own = load_backbone(run.out)[0].state_dict()
        assert inner and all(torch.equal(value, own[key]) for key, value in inner.items())
        assert all(key.startswith(("norm.", "fc_norm.", "head.")) for key in own.keys() - inner.keys())
    for height, width in ((64, 64), (96, 160), (50, 70)):
        maps = pyramid(torch.randn(2, 3, height, width))
        padded = -(-height // 32) * 32, -(-width // 32) * 32
        assert list(maps) == ["0", "1", "2", "3", "pool"]
        for stride, x in zip((4, 8, 16, 32), maps.values(), strict=False):
            assert x.shape == (2, 12, padded[0] // stride, padded[1] // stride)
        assert torch.equal(maps["pool"], maps["3"][..., ::2, ::2])
    sum(x.sum() for x in maps.values()).backward()  # type: ignore[union-attr]
    missed = [key for key, p in pyramid.named_parameters() if p.grad is None]
    assert not missed, missed


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_gives_the_maps_of_an_export(name: str, tmp_path: Path) -> None:
    run, images = run_of(name, tmp_path / "run"), torch.randn(2, 3, 64, 64)
    folder = export(Export(run=run.out))
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    assert_loaded(features, run.out)
    with torch.inference_mode():
        found = features(images)  # of a ViT the last blocks only
    for x, expected in zip(found, own_maps(run.out, images)[-len(found) :], strict=True):
        x = x.permute(0, 3, 1, 2) if getattr(features, "output_fmt", None) == "NHWC" else x
        assert torch.equal(x, expected)


def test_layers_of_the_simple_pyramid(tmp_path: Path) -> None:
    """As ViTDet's section 3 has them, of a map of stride 16 and 32 channels."""
    pyramid = leanmim.pyramid(run_of("vit", tmp_path / "run").out, out_channels=8)
    kinds = [[type(layer).__name__ for layer in level] for level in pyramid.neck.levels]  # type: ignore[union-attr]
    last = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    assert kinds == [
        ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", *last],
        ["ConvTranspose2d", *last],
        last,
        ["MaxPool2d", *last],
    ]
    inputs = [level[-4].in_channels for level in pyramid.neck.levels]  # type: ignore[union-attr]
    assert inputs == [8, 16, 32, 32]
    assert [level[-2].kernel_size for level in pyramid.neck.levels] == [(3, 3)] * 4  # type: ignore[union-attr]


def test_a_pyramid_of_nothing_and_of_a_classifier(tmp_path: Path) -> None:
    scratch = leanmim.pyramid("scratch", model="resnet18", model_kwargs=FAMILIES["resnet"][1])
    assert list(scratch(torch.randn(1, 3, 64, 64))) == ["0", "1", "2", "3"]
    tuned = finetuned("pvt", tmp_path / "run").state_dict()
    found = leanmim.pyramid(tmp_path / "run").backbone.state_dict()
    assert found and all(torch.equal(value, tuned[key]) for key, value in found.items())


def test_layers_without_pretraining_are_fresh(tmp_path: Path) -> None:
    run = run_of("convnext", tmp_path / "run", depth=2)
    found = leanmim.pyramid(run.out).backbone.state_dict()
    own = load_backbone(run.out)[0].backbone.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in own.items() if key in found)
    assert any(key.startswith("stages.3.") for key in found.keys() - own.keys())


def test_what_has_no_pyramid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has maps of stride 14; .* choose another backbone, or patches of 16 px"):
        leanmim.pyramid(
            "scratch", model="vit_tiny_patch16_224", model_kwargs=PATCHES | {"patch_size": 14}, input_size=56
        )
    hiera = leanmim.pyramid(
        "scratch", model="hiera_tiny_224", input_size=64,
        model_kwargs={"embed_dim": 32, "stages": [1, 1, 1, 1], "num_heads": 1},
    )  # fmt: skip
    assert [x.shape[-1] for x in hiera(torch.randn(1, 3, 64, 64)).values()] == [16, 8, 4, 2]
    with pytest.raises(UserError, match=r"takes images of 64 x 64 px only, not 96 x 64; resize them, or .*input_size"):
        hiera(torch.randn(1, 3, 96, 64))


@pytest.mark.parametrize(
    ("detector", "name"), [(FasterRCNN, "vit"), (FasterRCNN, "swin"), (FasterRCNN, "resnet"), (MaskRCNN, "vit")]
)
def test_torchvisions_detectors_train_and_detect(name: str, detector: Any, tmp_path: Path) -> None:
    pyramid = leanmim.pyramid(run_of(name, tmp_path / "run").out, out_channels=16, pool=True)
    model = detector(pyramid, num_classes=3, min_size=96, max_size=160, image_mean=pyramid.mean, image_std=pyramid.std)
    images = [torch.rand(3, 80, 100), torch.rand(3, 120, 64)]
    target = {"boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0]]), "labels": torch.tensor([1])}
    targets = [target | {"masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8)} for image in images]
    sum(model(images, targets).values()).backward()
    assert next(pyramid.backbone.parameters()).grad is not None
    found = model.eval()(images)
    assert len(found) == 2 and found[0].keys() >= {"boxes", "labels", "scores"}


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_unet_of_segmentation_models_pytorch(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path / "run")
    model = smp.Unet(f"tu-local-dir:{export(Export(run=run.out))}", encoder_weights=True, classes=3)
    assert_loaded(model.encoder, run.out)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_dpt_of_segmentation_models_pytorch(tmp_path: Path) -> None:
    run = run_of("vit", tmp_path / "run")
    model = smp.DPT(f"tu-local-dir:{export(Export(run=run.out))}", encoder_weights=True, classes=3)
    assert_loaded(model.encoder, run.out)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", ["vit", "swin", "pvt", "convnext", "resnet"])
def test_transformers_backbone_and_upernet(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path / "run")
    there, images = f"local-dir:{export(Export(run=run.out))}", torch.randn(1, 3, 64, 64)
    last = (1, 2, 3, 4) if name == "resnet" else (0, 1, 2, 3)
    # a Swin's maps are channels last, which UperNet does not know, unless timm's "getter" gives them
    backbone = transformers.TimmBackbone.from_pretrained(there, out_indices=last, feature_cls="getter").eval()
    if name == "resnet":  # transformers 5 sets the statistics of batch norms back
        maps = timm.create_model(there, pretrained=True, features_only=True, out_indices=last, feature_cls="getter")
        backbone.load_state_dict({f"_backbone.{key}": value for key, value in maps.state_dict().items()})
    assert_loaded(backbone, run.out)
    config = transformers.TimmBackboneConfig(backbone=there, out_indices=last)
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=config, num_labels=5, hidden_size=16, use_auxiliary_head=False)
    )
    model.backbone = backbone  # from a configuration it is random
    assert model.eval()(images).logits.shape == (1, 5, 64, 64)


@pytest.mark.parametrize("name", ["vit", "swin, wide", "pvt"])
def test_transformers_classifies_with_an_export(name: str, tmp_path: Path) -> None:
    own, images = finetuned(name, tmp_path / "run"), images_for(name)
    folder = export(Export(run=str(tmp_path / "run")))
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert torch.equal(model(images).logits, own(images))
    assert model.config.id2label == dict(enumerate(("cat", "sheep", "blue macaw")))


def test_an_export_says_how_it_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("pvt", tmp_path / "a run")
    write_export(Export(run=run.out))
    assert capsys.readouterr() == ("", "")
    export(Export(run=run.out))
    out, err = capsys.readouterr()
    first, *lines = err.splitlines()
    assert not out and first == "To load it in Python:"
    scope: dict[str, Any] = {}
    exec("\n".join(line.removeprefix("  ") for line in lines), scope)
    assert equal(scope["model"].state_dict(), load_backbone(run.out)[0].state_dict())
    assert_loaded(scope["maps"], run.out)
    assert isinstance(scope["pyramid"], Pyramid)
