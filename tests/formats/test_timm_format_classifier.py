"""A fine-tuned run, exported: timm's own classifier, which tells the classes apart as before."""

import json
from pathlib import Path

import pytest
import timm
import torch

from leanmim.classifier.model import build_classifier
from leanmim.config import Export
from leanmim.errors import UserError
from leanmim.formats import export
from leanmim.run import Run
from leanmim.start import open_start
from tests.formats.classifiers import CLASSES, CLASSIFIERS, finetuned, images_for
from tests.helpers import equal


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_timm_and_leanmim_load_the_classifier(name: str, tmp_path: Path) -> None:
    model, images = finetuned(name, tmp_path / "run"), images_for(name)
    with torch.inference_mode():
        expected = model(images)
    folder = export(Export(run=str(tmp_path / "run")))
    assert folder == tmp_path / "run" / "export" / "timm"

    local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = build_classifier(open_start(str(folder)))
    with torch.inference_mode():
        assert torch.equal(local(images), expected)
        assert torch.equal(ours(images), expected)
    assert equal(local.state_dict(), model.state_dict())
    known = local.pretrained_cfg
    assert known["label_names"] == list(CLASSES) and known["num_classes"] == 3
    own, _ = CLASSIFIERS[name]
    data = timm.data.resolve_data_config(model=local)
    assert tuple(data["input_size"]) == (own.channels, *own.size)
    assert list(data["mean"]) == [0.4] * own.channels and list(data["std"]) == [0.2] * own.channels
    assert data["crop_pct"] == 1.0 and data["interpolation"] == "bicubic"


def test_another_number_of_classes_gets_a_fresh_head(tmp_path: Path) -> None:
    model = finetuned("vit", tmp_path / "run")
    folder = export(Export(run=str(tmp_path / "run")))
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert other.head.weight.shape == (5, 32)
    assert torch.equal(other.fc_norm.weight, model.fc_norm.weight)


def test_a_checkpoint_of_the_run_can_be_chosen(tmp_path: Path) -> None:
    run, best = Run(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "best.pt"
    finetuned("vit", run.folder, crop=0.9)
    run.last.rename(best)
    folder = export(Export(run=str(best)))
    assert folder == run.folder / "export" / "timm"
    description = json.loads((folder / "config.json").read_text())
    assert description["pretrained_cfg"]["crop_pct"] == 0.9
    assert description["leanmim"] == {"recipe": "small", "step": 7, "epochs": 3}
    assert export(Export(run=str(run.folder), overwrite=True)) == folder  # of itself it is the best
    best.unlink()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export(Export(run=str(run.folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "transformers"}, "--format transformers takes no fine-tuned run; use --format timm or onnx"),
        ({"depth": 2}, "--depth: a fine-tuned run is written as a whole; give --depth to `leanmim finetune`"),
        ({"all_depths": True}, "--all-depths: a fine-tuned run is written as a whole"),
    ],
)
def test_what_is_not_for_classifiers(changes: dict, message: str, tmp_path: Path) -> None:
    finetuned("vit", tmp_path / "run")
    with pytest.raises(UserError, match=message):
        export(Export(run=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run" / "export").exists()
