"""What onnxruntime computes is what torch computes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leanmim.config import Export, Pretrain
from leanmim.encoders.backbone import as_tokens
from leanmim.errors import UserError
from leanmim.formats import export, onnx_format
from leanmim.recipes import FASTMIM
from leanmim.weights import load_backbone
from tests.formats.classifiers import CLASSES, CLASSIFIERS, finetuned, images_for
from tests.helpers import fake_run, images_of, in_segments

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


ENCODERS: dict[str, dict[str, Any]] = {  # the smallest of their kinds
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "pvt_v2_b0": {"depths": [1, 1, 1, 1]},
    "hiera_tiny_224": {"embed_dim": 16, "stages": [1, 1, 1, 1], "num_heads": 1},
}


def computed(folder: Path, images: Tensor) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Outputs and metadata."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {"images": images.numpy()})
    return dict(zip(names, found, strict=True)), session.get_modelmeta().custom_metadata_map


def assert_close(found: np.ndarray, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected.numpy()).max() <= 1e-4 * expected.abs().max().item()


def assert_same_features(config: Pretrain, folder: Path, depth: int | None = None) -> None:
    backbone, _, _ = load_backbone(config.out, depth=depth)
    for batch in (1, 5):
        images = images_of(config, batch)
        found, _ = computed(folder, images)
        with torch.inference_mode():
            tokens = as_tokens(backbone, backbone.forward_features(images))
        assert found.keys() == {"features", "tokens"}
        assert_close(found["tokens"], tokens)
        assert_close(found["features"], tokens.mean(1))


def test_an_encoder_and_its_description(tiny: Pretrain, tmp_path: Path) -> None:
    config = fake_run(replace(tiny, channels=1, input_size=(32, 48)), Path(tiny.out))
    folder = export(Export(run=config.out, format="onnx"))
    assert folder == tmp_path / "run" / "export" / "onnx"
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json"}
    assert_same_features(config, folder)
    _, metadata = computed(folder, images_of(config))
    known = json.loads((folder / "config.json").read_text())
    assert known == {key: json.loads(value) for key, value in metadata.items()}
    assert known == {
        "architecture": "vit_tiny_patch16_224", "outputs": ["features", "tokens"], "input_size": [1, 32, 48],
        "mean": [0.4], "std": [0.2], "crop_pct": 1.0, "interpolation": "bicubic",
    }  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_other_families(name: str, tiny: Pretrain) -> None:
    own = dict(model=name, model_kwargs=ENCODERS[name], input_size=(128,))
    config = fake_run(replace(FASTMIM, data=tiny.data, **own), Path(tiny.out))
    assert_same_features(config, export(Export(run=config.out, format="onnx")))


def test_the_first_stages_of_a_run_in_segments(tmp_path: Path) -> None:
    """Of a family that timm cannot build shorter: closed by the segment's norm."""
    config = fake_run(in_segments("convnext", "pixel", segments=(1, 4), mask_ratio=0.5), tmp_path / "run")
    folder = export(Export(run=config.out, format="onnx", depth=1))
    assert folder.name == "onnx-depth1"
    assert_same_features(config, folder, depth=1)


@pytest.mark.parametrize("name", ["vit", "convnext, grey"])
def test_a_classifier_and_its_classes(name: str, tmp_path: Path) -> None:
    model = finetuned(name, tmp_path / "run")
    folder = export(Export(run=str(tmp_path / "run"), format="onnx"))
    for batch in (1, 4):
        images = images_for(name, batch)
        found, metadata = computed(folder, images)
        with torch.inference_mode():
            assert_close(found["logits"], model(images))
        assert json.loads(metadata["label_names"]) == list(CLASSES)
        assert json.loads(metadata["input_size"]) == [CLASSIFIERS[name][0].channels, *CLASSIFIERS[name][0].size]


def test_another_result_is_refused_with_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetuned("vit", tmp_path / "run")
    helper = pytest.importorskip("onnx").helper
    mean = helper.make_node("ReduceMean", ["images"], ["logits"], axes=[2, 3], keepdims=0)
    ends = [helper.make_tensor_value_info(*end) for end in (("images", 1, ["b", 3, 32, 32]), ("logits", 1, ["b", 3]))]
    graph = helper.make_graph([mean], "mean", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    monkeypatch.setattr(onnx_format, "converted", lambda *_: model)
    with pytest.raises(
        UserError, match=r"logits of 1 images .* differ from torch's by \d\.\de-0\d .*nothing was written"
    ):
        export(Export(run=str(tmp_path / "run"), format="onnx"))
    assert not (tmp_path / "run" / "export").exists()


def test_what_torch_cannot_convert_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetuned("vit", tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(
        UserError, match=r"cannot convert vit_tiny_patch16_224 .*: no such operator\); use --format timm"
    ):
        export(Export(run=str(tmp_path / "run"), format="onnx"))


def test_missing_libraries_and_large_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetuned("vit", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_format, "LARGEST", 1000)
        with pytest.raises(UserError, match="2 GiB of weights or more, too much for an ONNX file; use --format timm"):
            export(Export(run=str(tmp_path / "run"), format="onnx"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'needs onnx, onnxscript and onnxruntime: pip install "leanmim\[onnx\]"'):
        export(Export(run=str(tmp_path / "run"), format="onnx"))
