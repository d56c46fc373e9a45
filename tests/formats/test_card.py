"""The model card says what the run folder knows, and nothing of the user's folders."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from leanmim.config import Export, Knn, Pretrain
from leanmim.errors import UserError
from leanmim.evaluators.knn import knn
from leanmim.formats import export
from leanmim.run import write_json
from leanmim.train.pretrain import pretrain
from tests.formats.classifiers import CLASSES, finetuned
from tests.helpers import fake_run, in_segments
from tests.runs import labelled


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")  # the hub's own reader


def blocks(card: ModelCard) -> list[str]:
    return [part.removeprefix("python\n") for part in card.text.split("```")[1::2]]


@pytest.mark.results
def test_the_card_of_a_run(tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pretrain(tiny)
    before = card_of(run / "export" / "timm")
    assert "No accuracy of these weights was measured." in before.text
    assert before.data.to_dict() == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "image-feature-extraction", "masked-image-modeling", "leanmim"],
    }
    written = (run / "export" / "timm" / "README.md").read_text()
    assert "\n# license: choose one, for example by --license apache-2.0\n---\n" in written
    assert "Not chosen yet" in before.text

    data = str(labelled(tmp_path / "secret"))
    found = dict(knn(Knn(run=str(run), data=data, k=2, workers=0, device="cpu", baselines=("random",))))
    card = card_of(export(Export(run=str(run), license="cc-by-4.0")))
    assert card.data.license == "cc-by-4.0"
    (row,) = [line for line in card.text.splitlines() if line.startswith("| kNN |")]
    assert f"| {100 * found['pretrained']:.1f} (" in row and "| 6 |" in row and "k=2" in row
    assert "| measure | this model (%) | random initialisation (%) | validation images | options |" in card.text
    cost = json.loads((run / "cost.json").read_text())
    assert f"| training FLOPs an image | {cost['predicted']['train_flops_per_image'] / 1e9:,.3f} G | - |" in card.text
    assert f"| images a second | - | {cost['measured']['images_per_second']:.0f} |" in card.text
    photos = len(json.loads((run / "names.json").read_text())["names"])
    assert f"| images | {photos} without labels |" in card.text
    assert "| epochs | 2 asked for, 8 steps done |" in card.text
    for private in (str(tmp_path), tiny.data, "secret", ".jpg"):
        assert private not in card.content

    hub, file = blocks(card)
    assert 'timm.create_model("hf-hub:OWNER/NAME", pretrained=True, num_classes=0)' in hub
    monkeypatch.chdir(run / "export" / "timm")
    scope: dict[str, Any] = {}
    exec(file, scope)
    local = timm.create_model("local-dir:.", pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(scope["model"](images), local(images))


def measured(what: str, value: float, interval: list[float], images: int, **more: Any) -> dict[str, Any]:
    """A line of evaluations.jsonl."""
    return {
        "what": what,
        "name": "pretrained",
        "value": value,
        "interval": interval,
        "images": images,
        "data": "d",
        **more,
    }


def test_accuracies_of_other_weights_are_not_the_cards(tiny: Pretrain) -> None:
    run = fake_run(tiny, Path(tiny.out))  # after step 7
    line = measured("knn", 0.5, [0.4, 0.6], 9, options={"k": 1})
    file = Path(run.out) / "evaluations.jsonl"
    file.write_text(json.dumps(line | {"step": 3}) + "\n")
    assert "No accuracy" in card_of(export(Export(run=run.out))).text
    other = line | {"step": 9, "name": "/home/me/other"}
    file.write_text("".join(json.dumps(one) + "\n" for one in (line | {"step": 7}, other)))
    text = card_of(export(Export(run=run.out))).text
    assert "| kNN | 50.0 (40.0 to 60.0) | 9 | k=1 |" in text and "/home" not in text


def test_the_kind_of_start_is_told_and_no_path(tiny: Pretrain, tmp_path: Path) -> None:
    public = "vit_tiny_patch16_224.augreg_in21k"
    for number, (init, told) in enumerate(
        {None: "random initialisation", public: public, str(tmp_path / "mine"): "weights of the authors' own"}.items()
    ):
        run = fake_run(replace(tiny, init=init), tmp_path / str(number))
        assert f"| started from | {told} |" in card_of(export(Export(run=run.out))).text


def test_the_cards_of_several_depths(tmp_path: Path) -> None:
    config = fake_run(in_segments(segments=2, mask_ratio=0.5), tmp_path / "run")
    line = measured("probe", 0.25, [0.2, 0.3], 8, step=7)
    lines = [line | {"options": {"depth": 2}}, line | {"options": {"depth": None}, "value": 0.75}]
    (tmp_path / "run" / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    folder = export(Export(run=config.out, all_depths=True, license="mit"))
    half, whole = (card_of(folder / f"timm-depth{depth}") for depth in (2, 4))
    assert "| depth | the first 2 of 4 blocks or stages |" in half.text and "| depth |" not in whole.text
    assert "| linear probe | 25.0 (" in half.text and "75.0" not in half.text
    assert "| linear probe | 75.0 (" in whole.text and "25.0" not in whole.text
    assert half.data.license == whole.data.license == "mit"


def test_the_card_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = finetuned("vit", tmp_path / "run")
    results = {
        "data": "/secret", "step": 7, "classes": list(CLASSES), "images": 40, "top1": 0.5, "top1_interval": [0.4, 0.6],
        "top5": None, "top5_interval": None, "mean_per_class": 0.45,
    }  # fmt: skip
    write_json(tmp_path / "run" / "results.json", results)
    write_json(tmp_path / "run" / "names.json", {"names": [], "sizes": [], "images": 120, "processes": 1})
    card = card_of(export(Export(run=str(tmp_path / "run"))))
    assert card.data.pipeline_tag == "image-classification"
    assert "| 50.0 (40.0 to 60.0) | - | 45.0 | 40 | 3 |" in card.text
    assert "| images | 120 with labels |" in card.text
    assert "Classes: cat, sheep, blue macaw" in card.text
    assert "secret" not in card.content
    hub, file = blocks(card)
    assert "num_classes" not in hub
    monkeypatch.chdir(tmp_path / "run" / "export" / "timm")
    scope: dict[str, Any] = {}
    exec(file, scope)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(scope["model"](images), model(images), atol=1e-6)


def test_only_timm_has_a_card(tiny: Pretrain) -> None:
    run = fake_run(tiny, Path(tiny.out))
    with pytest.raises(UserError, match=r"--license is for the model card, which --format transformers has none of"):
        export(Export(run=run.out, format="transformers", license="mit"))
    assert not (export(Export(run=run.out, format="transformers")) / "README.md").exists()
    with pytest.raises(UserError, match=r"--license 'Apache 2' is no licence"):
        export(Export(run=run.out, license="Apache 2"))
