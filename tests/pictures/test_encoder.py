"""Pictures of an encoder: colours are principal components, heat is softmax(q k), and what has neither is told so."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from leanmim import pictures
from leanmim.config import Pretrain, Show
from leanmim.config.tools import Picture
from leanmim.data import Normalise, centre_crop, open_source
from leanmim.encoders.backbone import as_tokens, create_backbone
from leanmim.errors import UserError
from leanmim.pictures import PICTURES, show
from leanmim.pictures.attention import attention_maps, last_attention
from leanmim.pictures.features import coloured
from leanmim.pictures.figures import abreast
from leanmim.pictures.shown import open_shown
from leanmim.start import open_start
from tests.drawn import Drawn, run_of
from tests.formats.classifiers import finetuned
from tests.helpers import PHOTOS, PLAIN, noisy


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


# Features


def by_svd(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first three components of all patches by NumPy, their signs unknown; and shares of the variance."""
    x = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    x = x - x.mean(0)
    _, values, directions = np.linalg.svd(x, full_matrices=False)
    return x @ directions[:3].T, values[:3] ** 2 / (values**2).sum()


def stretched_like(components: np.ndarray) -> np.ndarray:
    low, high = np.percentile(components, (1, 99), axis=0)
    return np.clip((components - low) / (high - low), 0, 1)


def test_colours_are_the_principal_components_of_all_images_together() -> None:
    maps = torch.stack([noisy(1, 12, 4, 6, seed)[0].permute(1, 2, 0) * (1 + seed) + seed for seed in range(3)])
    found = coloured(maps)
    components, shares = by_svd(maps.numpy())
    assert found.colours.shape == (3, 4, 6, 3)
    assert found.shares == pytest.approx(shares.tolist(), abs=1e-5)
    for own, component in zip(found.colours.reshape(-1, 3).T, components.T, strict=True):
        either = [stretched_like(sign * component[:, None])[:, 0] for sign in (1, -1)]
        assert min(np.abs(own - one).max() for one in either) < 1e-4


def test_too_few_patches() -> None:
    with pytest.raises(UserError, match=r"2 images of 1 x 1 patches are too few .* give more images"):
        coloured(torch.randn(2, 1, 1, 8))


@pytest.mark.parametrize("kind", ["mae", "swin", "convnext", "segments"])
def test_the_picture_of_features(kind: str, tiny: Pretrain, tiny_simmim: Pretrain, drawn: Drawn) -> None:
    config = {
        "mae": replace(tiny, input_size=(24, 40)),
        "swin": replace(
            tiny_simmim, model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, mask_unit=32
        ),
        "convnext": replace(tiny_simmim, masking="pixel", model="convnext_atto", model_kwargs={}, mask_unit=32),
        "segments": replace(tiny, segments=2),
    }[kind]
    run = run_of(config)
    assert show(Show(runs=(str(run),), picture="features", count=4)) == run / "features.png"
    photos, colours = drawn.pictures[::2], drawn.pictures[1::2]
    start = open_start(str(run))
    source, crop = open_source(str(PHOTOS), 3), centre_crop(config.size)
    images = torch.stack([crop(source.read(i)) for i in (0, 4, 8, 12)])
    with torch.no_grad():
        encoder = start.encoder()
        normalise = Normalise(start.mean, start.std, torch.device("cpu"))
        tokens = as_tokens(encoder, encoder.forward_features(normalise(images)))
    components, shares = by_svd(tokens.numpy())
    for own, component in zip(np.stack(colours).reshape(-1, 3).T, components.T, strict=True):
        assert abs(np.corrcoef(own, component)[0, 1]) > 0.95  # all but the ends of the range
    assert f"= {shares.sum():.0%} of the variance" in drawn.texts[-1]
    for photo, image in zip(photos, images, strict=True):
        assert np.array_equal(photo, (image / 255).permute(1, 2, 0).numpy())


# Attention


def by_hand(vit: Any, images: Tensor) -> Tensor:
    """softmax(q k / sqrt(width of a head)) of the last block, b heads t t."""
    tokens: list[Tensor] = []
    block = vit.blocks[-1]
    hook = block.norm1.register_forward_hook(lambda _, __, out: tokens.append(out))
    with torch.no_grad():
        vit.forward_features(images)
        hook.remove()
        x, heads = tokens[0], block.attn.num_heads
        q, k, _ = block.attn.qkv(x).unflatten(2, (3, heads, -1)).unbind(2)  # b t heads d
        return torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("more", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}])
def test_attention_is_the_softmax_of_query_times_key(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vit = create_backbone("vit_tiny_patch16_224", (24, 40), 3, **PLAIN, **more).eval()
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = noisy(2, 3, 24, 40)
    expected, fused = by_hand(vit, images), vit.blocks[-1].attn.fused_attn
    found = last_attention(vit, images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))
    assert vit.blocks[-1].attn.fused_attn == fused and not vit.blocks[-1].attn.attn_drop._forward_pre_hooks

    maps, of = attention_maps(vit, images)
    prefix, mean = vit.num_prefix_tokens, expected.mean(1)
    rows = mean[:, 0, prefix:] if vit.has_class_token else mean[:, prefix:, prefix:].mean(1)
    assert maps.shape == (2, 3, 5)
    torch.testing.assert_close(maps.flatten(1), rows, atol=1e-5, rtol=1e-4)
    assert ("class token" in of) == vit.has_class_token
    if not prefix:
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beitv2_base_patch16_224"])
def test_attention_of_other_vits(name: str) -> None:
    small = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    vit = create_backbone(name, (56, 56) if "14" in name else (64, 64), 3, **small).eval()
    maps, of = attention_maps(vit, noisy(2, 3, *((56, 56) if "14" in name else (64, 64))))
    assert maps.shape == (2, 4, 4) and "patches" in of  # they pool by the mean
    assert (maps > 0).all() and (maps.sum((1, 2)) < 1).all()


@pytest.mark.parametrize(
    ("name", "size"), [("convnext_atto", 64), ("swin_tiny_patch4_window7_224", 64), ("hiera_tiny_224", 224)]
)
def test_a_backbone_without_such_attention(name: str, size: int) -> None:
    backbone = create_backbone(name, (size, size), 3).eval()
    with pytest.raises(UserError, match=r"--picture attention is for a ViT.* --picture features draws any backbone"):
        attention_maps(backbone, torch.zeros(1, 3, size, size))


def test_the_picture_of_attention(tiny: Pretrain, drawn: Drawn) -> None:
    run = run_of(tiny)
    assert show(Show(runs=(str(run),), picture="attention", count=2)) == run / "attention.png"
    heats = drawn.pictures[2::3]
    shown = open_shown(Show(runs=(str(run),)))
    images = torch.stack([centre_crop(tiny.size)(shown.source.read(i)) for i in (0, 8)])
    expected = by_hand(shown.backbone, shown.normalise(images)).mean(1)[:, 0, 1:]
    np.testing.assert_allclose(np.stack(heats).reshape(2, -1), expected.cpu().numpy(), atol=1e-5)
    assert f"at most {expected[0].max():.1%} to a patch" in drawn.texts
    assert "class token's attention" in drawn.texts[-1] and "6.25% to each of 16 patches" in drawn.texts[-1]


def test_a_fine_tuned_vit_that_pools_by_the_mean(tmp_path: Path, drawn: Drawn) -> None:
    finetuned("vit", tmp_path / "run")
    show(Show(runs=(str(tmp_path / "run"),), picture="attention", images=(str(PHOTOS / "cat.jpg"),)))
    assert drawn.texts[-1].startswith("fine-tuned, vit_tiny_patch16_224, step 7\nthe mean of the patches' attention")


# What is common to them


def test_every_picture_has_a_function() -> None:
    assert PICTURES.keys() == {*get_args(Picture)}
    for picture, place in PICTURES.items():
        Show(runs=("run",), picture=picture).check()  # type: ignore[arg-type]
        module, name = place.split(".")
        assert callable(getattr(import_module(f"leanmim.pictures.{module}"), name))
    with pytest.raises(UserError, match=r"picture cannot be 'photo'; it takes 'reconstructions'"):
        Show(runs=("run",), picture="photo").check()  # type: ignore[arg-type]


def test_a_segment_is_of_reconstructions() -> None:
    with pytest.raises(UserError, match=r"--segment is for reconstructions; .* --picture features"):
        show(Show(runs=("run",), picture="features", segment=0))


def test_a_fine_tuned_run_without_list_of_images(tmp_path: Path) -> None:
    finetuned("vit", tmp_path / "run")
    with pytest.raises(UserError, match=r"has no images of its own; give some with --images"):
        show(Show(runs=(str(tmp_path / "run"),), picture="features"))


def test_grey_and_stored_images_are_drawn(tiny: Pretrain, tmp_path: Path, drawn: Drawn) -> None:
    assert show(Show(runs=(str(run_of(replace(tiny, channels=1))),), picture="features", count=2)).is_file()
    (tmp_path / "bands").mkdir()
    for i in range(2):
        np.save(
            tmp_path / "bands" / f"{i}.npy", np.random.default_rng(i).integers(0, 5000, (48, 48, 5), dtype=np.uint16)
        )
    stored = replace(tiny, data=str(tmp_path / "bands"), out=str(tmp_path / "five"), channels=5, values="stored")
    seen = len(drawn.pictures)
    assert show(Show(runs=(str(run_of(stored)),), picture="features", count=2)).is_file()
    photo = drawn.pictures[seen]
    assert photo.shape[2] == 3 and photo.min() == 0 and photo.max() == 1  # three bands, stretched


@pytest.mark.parametrize(("count", "across"), [(1, 1), (3, 1), (4, 2), (8, 2), (16, 3), (100, 6)])
def test_many_rows_stand_side_by_side(count: int, across: int) -> None:
    assert abreast(count, 4.2, 2.22) == across


@pytest.mark.usefixtures("whole_pictures")
@pytest.mark.parametrize("picture", ["features", "attention"])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_no_picture_is_tall_and_narrow(picture: Any, count: int, tiny: Pretrain) -> None:
    with Image.open(show(Show(runs=(str(run_of(tiny)),), picture=picture, count=count))) as drawn:
        assert drawn.height < 2 * drawn.width < 8 * drawn.height


def test_names_are_shortened_and_no_formulas(tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    file = tmp_path / f"$\\frac${'x' * 99}.jpg"
    file.symlink_to(PHOTOS / "cat.jpg")
    show(Show(runs=(str(run_of(tiny)),), picture="features", images=(str(file),)))
    label = figures[0].axes[0].xaxis.label
    assert len(label.get_text()) <= 34 and not label.get_parse_math() and label.get_rotation() == 0
