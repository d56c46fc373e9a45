"""The examples train on a handful of drawn images, for some steps, and report."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

from leanmim.config import Pretrain
from tests.helpers import fake_run

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu"]


def main_of(name: str) -> Callable[[list[str]], float]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


def scene(seed: int) -> tuple[Image.Image, Image.Image, tuple[int, int, int, int]]:
    """A bright square on grey: the image, the mask (1 in the square, 11 at its left edge), the square."""
    left, top = np.random.default_rng(seed).integers(8, 40, 2).tolist()
    image, mask, box = (
        Image.new("RGB", (96, 72), (90, 90, 90)),
        Image.new("L", (96, 72)),
        (left, top, left + 24, top + 24),
    )
    ImageDraw.Draw(image).rectangle(box, (250, 200, 40))
    ImageDraw.Draw(mask).rectangle(box, 1)
    ImageDraw.Draw(mask).line((left, top, left, top + 24), 11)
    return image, mask, box


def test_segmentation(tiny: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = fake_run(tiny, Path(tiny.out)), tmp_path / "data"
    for part, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (data / kind / part).mkdir(parents=True)
        for i in range(count):
            image, mask, _ = scene(i)
            image.save(data / "images" / part / f"{i}.jpg")
            mask.save(data / "masks" / part / f"{i}.png")
    line = [
        "--start",
        run.out,
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--classes",
        "2",
        "--crop",
        "64",
        "64",
    ]
    mean = main_of("segment")([*line, *QUICK])
    assert 0 <= mean <= 1
    assert f"mIoU {100 * mean:.2f} % of 2 images" in capsys.readouterr().out
    weights = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert any(name.startswith("pyramid.backbone.blocks") for name in weights)
    assert size_of(tmp_path / "out" / "predictions.png")[0] > 100
    for part in ("train", "val"):  # the other way to lay out folders
        (data / part).mkdir()
        for kind in ("images", "masks"):
            (data / kind / part).rename(data / part / kind)
    (data / "images").rmdir()
    assert main_of("segment")([*line, "--width", "32", *QUICK]) >= 0
    (data / "val" / "masks" / "0.png").unlink()
    with pytest.raises(SystemExit, match="images of val, or the PNG file of a mask"):
        main_of("segment")([*line, *QUICK])


def coco(data: Path) -> None:
    """As COCO has it; categories need not be numbered from 1 on."""
    (data / "images").mkdir(parents=True)
    for part, count in (("train", 3), ("val", 2)):
        known: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "square"}]}
        for i in range(count):
            image, _, (left, top, right, bottom) = scene(i)
            image.save(data / "images" / f"{part}{i}.jpg")
            known["images"].append({"id": i, "file_name": f"{part}{i}.jpg", "height": 72, "width": 96})
            box = {"bbox": [left, top, right - left, bottom - top], "area": 576, "iscrowd": 0, "category_id": 7}
            known["annotations"].append({"id": i + 1, "image_id": i, **box})
        (data / f"{part}.json").write_text(json.dumps(known))


def voc(data: Path) -> None:
    """As Pascal VOC has it."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (data / folder).mkdir(parents=True)
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            image, _, box = scene(i)
            image.save(data / "JPEGImages" / f"{part}{i}.jpg")
            sides = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            (data / "Annotations" / f"{part}{i}.xml").write_text(
                "<annotation><size><width>96</width><height>72</height></size>"
                f"<object><name>square</name><bndbox>{sides}</bndbox></object></annotation>"
            )
        (data / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{part}{i}\n" for i in range(count)))


@pytest.mark.parametrize("layout", [coco, voc])
def test_detection(
    layout: Callable[[Path], None], tiny: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = fake_run(tiny, Path(tiny.out)), tmp_path / "data"
    layout(data)
    line = ["--start", run.out, "--data", str(data), "--out", str(tmp_path / "out"), "--size", "64", *QUICK]
    mean = main_of("detect")(line)
    assert 0 <= mean <= 1
    assert f"mAP {100 * mean:.2f} %" in capsys.readouterr().out
    assert size_of(tmp_path / "out" / "predictions.png") == (2 * 480 + 24, 2 * 360 + 24)
    weights = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert any(name.startswith("backbone.backbone.blocks") for name in weights)


def test_the_truth_is_found_right(tmp_path: Path) -> None:
    """The mean average precision of the boxes themselves is 1."""
    voc(tmp_path)
    module = runpy.run_path(str(ROOT / "examples" / "detect.py"))
    boxes = module["Boxes"](tmp_path, "val", lambda image, target: (image, target))

    class Oracle(torch.nn.Module):
        seen = 0

        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            _, target = boxes[self.seen]
            self.seen += 1
            return [{"boxes": target["boxes"].clone(), "labels": target["labels"], "scores": torch.ones(1)}]

    assert module["evaluate"](Oracle(), boxes, "cpu") == pytest.approx((1.0, 1.0))


def squares(folder: Path, count: int) -> Path:
    """So many images of a bright square."""
    folder.mkdir(parents=True)
    for i in range(count):
        scene(i)[0].save(folder / f"{i}.png")
    return folder


def test_depths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        squares(tmp_path / "labelled" / part / "square", 2)
        (tmp_path / "labelled" / part / "grey").mkdir()
        Image.new("RGB", (96, 72), (90, 90, 90)).save(tmp_path / "labelled" / part / "grey" / "0.png")
    line = ["--data", str(squares(tmp_path / "data", 4)), "--labelled", str(tmp_path / "labelled"), "--device", "cpu"]
    line += ["--out", str(tmp_path / "out"), "--segments", "2", "--size", "64", "--epochs", "1", "--batch-size", "4"]
    line += ["--workers", "0"]
    main = main_of("depths")
    half, whole = main(line)
    assert (half.depth, whole.depth) == (6, 12)
    assert half.images_per_second > 0 and 0 <= half.accuracy <= 1
    assert 1.8 < whole.gflops / half.gflops < 2 and 1.8 < whole.parameters / half.parameters < 2  # all but the stem
    printed = capsys.readouterr().out
    assert f"| 6 | {half.parameters / 1e6:.2f} | {half.gflops:.3f} |" in printed
    assert f"None is within {whole.gflops / 2:.3f} GFLOPs" in printed
    with pytest.raises(SystemExit):
        main(line[2:])  # --labelled alone
    assert main.__globals__["DEMO"].is_file()


def test_a_loop_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--data", str(squares(tmp_path / "data", 4)), "--out", str(tmp_path / "out"), "--size", "64", *QUICK]
    history = main_of("own_loop")([*line, "--recipe", "bim"])
    assert len(history) == 2 and all(0 < loss < 10 for loss in history)
    (losses,) = re.findall(r"step 2/2, losses (.*)", capsys.readouterr().out)
    assert len(losses.split()) == 4  # one for each segment
    weights = torch.load(tmp_path / "out" / "encoder.pt", weights_only=True)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    assert model.load_state_dict(weights, strict=False).missing_keys == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there is no JPEG or PNG file"):
        main_of("own_loop")(["--data", str(tmp_path / "empty"), *line[2:]])


def test_multispectral(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--out", str(tmp_path / "out"), "--channels", "5", "--size", "32", "--tiles", "4", "--batch-size", "4"]
    share = main_of("multispectral")([*line, "--epochs", "1", "--tuning-epochs", "1", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "numbers: uint16 (16)" in printed and "kNN, random:" in printed
    assert f"in timm {round(4 * share)} of 4 validation tiles are classified right" in printed
    accuracy = json.loads((tmp_path / "out" / "tuned" / "results.json").read_text())["top1"]
    assert share == pytest.approx(accuracy)  # timm says of each tile what leanmim says


def test_the_site_has_each_example_with_its_command() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    for file in (ROOT / "examples").glob("*.py"):
        assert f"`{file.name}`: " in page
        (command,) = re.findall(rf"^(python examples/{file.name} .*)$", page, re.M)
        options = set(re.findall(r"--[\w-]+", command))
        assert options <= set(re.findall(r'"(--[\w-]+)"', file.read_text()))
