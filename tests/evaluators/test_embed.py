"""Features of a folder in a file: the same as of one forward pass."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from leanmim.config import Knn, Pretrain
from leanmim.config.embed import Embed
from leanmim.data import Normalise, centre_crop, list_images, read_image
from leanmim.errors import UserError
from leanmim.evaluators.cache import TOKENS, storage
from leanmim.evaluators.embed import embed
from leanmim.evaluators.features import subjects
from leanmim.weights import load_backbone
from tests.helpers import PHOTOS, PLAIN, fake_run, in_segments
from tests.runs import labelled

PATHS = [str(path) for path in list_images(PHOTOS)]


def config_of(run: Pretrain, **changes: object) -> Embed:
    own = dict(start=run.out, data=str(PHOTOS), out=f"{run.out}.npy", device="cpu", workers=0, batch_size=5)
    return Embed(**{**own, **changes})  # type: ignore[arg-type]


def photos_of(size: tuple[int, int], mean: float = 0.4, std: float = 0.2, channels: int = 3) -> Tensor:
    """All of them in one batch, as the model takes them."""
    images = torch.stack([centre_crop(size)(read_image(path, channels)) for path in PATHS])
    return Normalise([mean] * channels, [std] * channels, torch.device("cpu"))(images)


def assert_close(found: np.ndarray, expected: Tensor) -> None:
    assert found.dtype == np.float32 and found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def run(tiny: Pretrain) -> Pretrain:
    return fake_run(tiny, Path(tiny.out))


@torch.inference_mode()
def test_a_vits_features_are_those_of_one_forward_pass(run: Pretrain) -> None:
    vit, _, _ = load_backbone(run.out)
    images = photos_of(run.size)
    tokens = vit.forward_features(images)
    blocks = [vit._pos_embed(vit.patch_embed(images))]
    for block in vit.blocks:
        blocks.append(block(blocks[-1]))
    for changes, expected in (
        ({}, tokens[:, 1:].mean(1)),
        ({"pool": "token"}, tokens[:, 0]),
        ({"pool": "timm"}, vit(images)),
        ({"features": "patches"}, tokens[:, 1:]),
        ({"layer": 1}, blocks[1][:, 1:].mean(1)),
        ({"layer": 4}, blocks[4][:, 1:].mean(1)),
        ({"layer": 3, "pool": "token"}, blocks[3][:, 0]),
        ({"layer": 2, "features": "patches"}, blocks[2][:, 1:]),
    ):
        file = embed(config_of(run, **changes, overwrite=True))
        assert_close(np.load(file), expected)
        assert file.with_suffix(".txt").read_text().splitlines() == PATHS
        assert not file.with_name("run.npy.parts").exists() and not file.with_name("run.npy.skipped.jsonl").exists()


@torch.inference_mode()
def test_a_hierarchical_models_stages(tmp_path: Path) -> None:
    """Of a random initialisation, in a wide shape."""
    own: dict = dict(
        start="scratch", model="convnext_atto", data=str(PHOTOS), out=str(tmp_path / "f.npy"), input_size=(64, 96),
        device="cpu", workers=0, overwrite=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = create_model("convnext_atto", num_classes=0).eval()
    images = torch.stack([centre_crop((64, 96))(read_image(path, 3)) for path in PATHS])
    images = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.device("cpu"))(images)
    stages = model.forward_intermediates(images, intermediates_only=True)
    for changes, expected in (
        ({"layer": 2}, stages[1].mean((2, 3))),
        ({"layer": 3, "features": "patches"}, stages[2].flatten(2).transpose(1, 2)),
        ({}, model.forward_features(images).mean((2, 3))),
    ):
        assert_close(np.load(embed(Embed(**own, **changes))), expected)


@torch.inference_mode()
def test_another_size_crop_and_precision(run: Pretrain) -> None:
    vit, _, _ = load_backbone(run.out, (48, 48))
    images = torch.stack([centre_crop((48, 48), 0.5)(read_image(path, 3)) for path in PATHS])
    expected = vit.forward_features(Normalise([0.4] * 3, [0.2] * 3, torch.device("cpu"))(images))[:, 1:].mean(1)
    file = embed(config_of(run, input_size=(48,), crop=0.5, dtype="float16"))
    found = np.load(file)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=1e-3)


def test_parquet_has_the_same_rows(run: Pretrain, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for features, dtype in (("pooled", "float32"), ("patches", "float16")):
        own = dict(features=features, dtype=dtype, overwrite=True)
        array = np.load(embed(config_of(run, **own)))
        table = parquet.read_table(embed(config_of(run, out=str(tmp_path / "f.parquet"), **own)))
        assert table.column_names == ["path", "embedding"]
        assert table["path"].to_pylist() == PATHS
        kind = table.schema.field("embedding").type
        widths = []
        while hasattr(kind, "list_size"):
            widths.append(kind.list_size)
            kind = kind.value_type
        assert tuple(widths) == array.shape[1:]
        assert str(kind) == {"float32": "float", "float16": "halffloat"}[dtype]
        assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype), array)


def test_several_folders_and_names_on_one_line(run: Pretrain, tmp_path: Path) -> None:
    root = labelled(tmp_path / "labelled", 1)
    (root / "val" / "red" / "0.png").rename(root / "val" / "red" / "a\nb.png")
    file = embed(config_of(run, data=(str(root / "train"), str(root / "val"))))
    names = [
        f"{root}/train/blue/0.png",
        f"{root}/train/red/0.png",
        f"{root}/val/blue/0.png",
        f"{root}/val/red/a\\nb.png",
    ]
    assert file.with_suffix(".txt").read_text().splitlines() == names
    found = np.load(file)
    assert np.allclose(found[0], found[2], atol=1e-6) and not np.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out": "features.csv"}, r"features.csv' is of no known kind.*\.npy or \.parquet"),
        ({"features": "patches", "pool": "token"}, "--pool is for pooled features"),
        ({"layer": 2, "pool": "timm"}, "--pool timm is for the last layer"),
        ({"layer": 0}, "--layer 0 is out of range"),
        ({"layer": 5}, "--layer 5 is out of range; the model has 4"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"crop": 2.0}, "--crop 2.0"),
        ({"input_size": (1, 2, 3)}, "--input-size takes"),
        ({"model": "resnet18"}, "leave --model"),
        ({"data": "nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_what_is_refused(run: Pretrain, wrong: dict[str, object], message: str) -> None:
    before = set(Path(run.out).parent.iterdir())
    with pytest.raises(UserError, match=message):
        embed(config_of(run, **wrong))
    assert set(Path(run.out).parent.iterdir()) == before


def test_the_mean_of_patches_is_what_is_pooled_but_for_a_norm_after_the_pool(tmp_path: Path) -> None:
    """And features are those of the evaluators, in half precision their tokens."""
    tiles = labelled(tmp_path / "labelled")
    for pool, normed in (("token", False), ("avg", True)):
        vit: dict = dict(model="vit_tiny_patch16_224", model_kwargs=PLAIN | {"global_pool": pool}, input_size=(32,))
        own: dict = dict(start="scratch", data=str(tiles / "val"), device="cpu", workers=0, overwrite=True)
        patches, pooled = (
            np.load(embed(Embed(**own, **vit, features=features, out=str(tmp_path / "f.npy"))))
            for features in ("patches", "pooled")
        )
        mean = torch.from_numpy(patches.mean(1))
        expected = nn.functional.layer_norm(mean, mean.shape[1:], eps=1e-6) if normed else mean
        assert_close(pooled, expected)
        assert np.allclose(pooled, mean, atol=1e-3) is not normed
        config = Knn(run="scratch", data=str(tiles), device="cpu", workers=0, **vit)
        (subject,) = subjects(config)
        with storage(config) as store:
            found = store.arrays(subject, subject.val, ["avg", TOKENS])
        assert_close(found["avg"], torch.from_numpy(pooled))
        np.testing.assert_allclose(found[TOKENS], patches, rtol=2e-3, atol=1e-3)


def test_layers_of_a_model_that_was_cut(tmp_path: Path) -> None:
    """timm still lists the stages that it cut off."""
    run = fake_run(in_segments("convnext", "pixel"), tmp_path / "run")
    assert np.load(embed(config_of(run, depth=2, layer=2))).shape == (len(PATHS), 80)
    with pytest.raises(UserError, match="--layer 3 is out of range; the model has 2"):
        embed(config_of(run, depth=2, layer=3, overwrite=True))


def test_models_without_such_layers_or_tokens(tmp_path: Path) -> None:
    own = dict(start="scratch", data=str(PHOTOS), out=str(tmp_path / "f.npy"), device="cpu", input_size=(32,))
    with pytest.raises(UserError, match="--pool token: this model has no class token; use avg"):
        embed(Embed(**own, model="vit_medium_patch16_gap_256", model_kwargs=PLAIN, layer=1, pool="token"))  # type: ignore[arg-type]


def test_without_pyarrow_a_remedy(run: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "leanmim\[parquet\]"; or give \.npy'):
        embed(replace(config_of(run), out="f.parquet"))
