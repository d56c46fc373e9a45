"""Object detection from a pre-trained encoder: torchvision's Faster R-CNN on leanmim's pyramid.

    python examples/detect.py --start run --data bccd --out detected

DATA holds train.json and val.json as COCO has them, beside the folder `images` with the files that they name; or it is laid
out as Pascal VOC: JPEGImages, Annotations, ImageSets/Main/train.txt and val.txt. Reports COCO's mean average precision,
and draws boxes. It wants `pip install ".[examples]"`.
"""

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

import leanmim
from leanmim.schedule import learning_rate


def annotations(data: Path, part: str) -> dict[str, Any]:
    """The images, boxes and categories of a part, as COCO's JSON has them; paths of images relative to the folder."""
    file = data / f"{part}.json"
    if file.is_file():
        found = json.loads(file.read_text())
        return found | {"images": [image | {"file_name": f"images/{image['file_name']}"} for image in found["images"]]}
    listed = data / "ImageSets" / "Main" / f"{part}.txt"
    if not listed.is_file():
        raise SystemExit(f"{data}: neither {file.name} (COCO) nor {listed.relative_to(data)} (Pascal VOC) is there")
    trees = {name: ElementTree.parse(data / "Annotations" / f"{name}.xml") for name in listed.read_text().split()}
    every = [ElementTree.parse(path) for path in sorted((data / "Annotations").glob("*.xml"))]
    names = sorted({name.text for tree in every for name in tree.iterfind("object/name")})  # the same in each part
    images, boxes = [], []
    for i, (name, tree) in enumerate(trees.items()):
        height, width = (int(tree.findtext(f"size/{side}")) for side in ("height", "width"))
        images.append({"id": i, "file_name": f"JPEGImages/{name}.jpg", "height": height, "width": width})
        for thing in tree.iterfind("object"):
            left, top, right, bottom = (
                float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            box, kind = [left, top, right - left, bottom - top], names.index(thing.findtext("name")) + 1
            boxes.append(
                {"id": len(boxes) + 1, "image_id": i, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
    return {
        "images": images,
        "annotations": boxes,
        "categories": [{"id": i, "name": n} for i, n in enumerate(names, 1)],
    }


class Boxes(Dataset):
    """Images with their boxes; labels are the numbers of the categories, from 1."""

    def __init__(self, data: Path, part: str, transform: v2.Transform) -> None:
        self.data, self.transform = data, transform
        with redirect_stdout(StringIO()):
            self.coco = COCO()
            self.coco.dataset = annotations(data, part)
            self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)
        self.kinds = sorted(self.coco.cats)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        known = self.coco.imgs[self.ids[index]]
        image = tv_tensors.Image(Image.open(self.data / known["file_name"]).convert("RGB"))
        own = [a for a in self.coco.imgToAnns[known["id"]] if not a["iscrowd"] and min(a["bbox"][2:]) > 0]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.kinds.index(a["category_id"]) + 1 for a in own], dtype=torch.int64)
        shaped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        image, target = self.transform(image, {"boxes": shaped, "labels": labels})
        return image, target | {"image_id": known["id"]}


def evaluate(model: FasterRCNN, boxes: Boxes, device: str) -> tuple[float, float]:
    """COCO's mean average precision over thresholds of 0.50 to 0.95, and that of 0.50."""
    found: list[dict[str, Any]] = []
    model.eval()
    with torch.inference_mode():
        for image, target in boxes:
            (result,) = model([image.to(device)])
            corners = result["boxes"].cpu()
            corners[:, 2:] -= corners[:, :2]
            for box, label, score in zip(
                corners.tolist(), result["labels"].tolist(), result["scores"].tolist(), strict=True
            ):
                kind = boxes.kinds[label - 1]
                found.append({"image_id": target["image_id"], "category_id": kind, "bbox": box, "score": score})
    if not found:
        return 0.0, 0.0
    with redirect_stdout(StringIO()):
        measure = COCOeval(boxes.coco, boxes.coco.loadRes(found), "bbox")
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    return float(measure.stats[0]), float(measure.stats[1])


def draw(model: FasterRCNN, boxes: Boxes, file: Path, device: str) -> None:
    """Up to four images with the boxes that are found with a score of one half or more, and beside each its true ones."""
    names = ["", *(boxes.coco.cats[kind]["name"] for kind in boxes.kinds)]
    tiles = []
    model.eval()
    for index in torch.linspace(0, len(boxes) - 1, min(4, len(boxes))).long().tolist():
        image, target = boxes[index]
        with torch.inference_mode():
            (found,) = model([image.to(device)])
        sure = found["scores"] >= 0.5
        for corners, labels in ((found["boxes"][sure], found["labels"][sure]), (target["boxes"], target["labels"])):
            kinds = [names[label] for label in labels.tolist()]
            colours = [("black", "red", "blue", "orange", "green", "purple")[label % 6] for label in labels.tolist()]
            drawn = (image * 255).byte()
            if len(corners):
                drawn = draw_bounding_boxes(drawn, corners.cpu(), kinds, colours, width=3)
            tiles.append(torch.nn.functional.interpolate(drawn[None] / 255, (360, 480), mode="area")[0])
    save_image(make_grid(tiles, nrow=2, padding=8, pad_value=1), file)


def main(arguments: list[str] | None = None) -> float:
    """Train and measure; the mean average precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--start", required=True, help="run or export folder, timm's name of published weights, or scratch"
    )
    parser.add_argument("--model", help="timm's name of the architecture, for scratch")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--size", type=int, default=480, help="short side to which images are scaled, px")
    parser.add_argument("--width", type=int, default=256, help="channels of the pyramid")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    torch.manual_seed(given.seed)
    plain = v2.ToDtype(torch.float32, scale=True)
    train = Boxes(given.data, "train", v2.Compose([v2.RandomHorizontalFlip(), plain]))
    val = Boxes(given.data, "val", plain)
    pyramid = leanmim.pyramid(given.start, given.width, pool=True, model=given.model)
    model = FasterRCNN(
        pyramid, num_classes=len(train.kinds) + 1, min_size=given.size, max_size=2 * given.size,
        box_batch_size_per_image=128, image_mean=pyramid.mean, image_std=pyramid.std,
    ).to(given.device)  # fmt: skip
    drawn = RandomSampler(train, num_samples=given.steps * given.batch_size)
    feed = DataLoader(
        train,
        given.batch_size,
        sampler=drawn,
        num_workers=given.workers,
        collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.05)
    warmup = max(1, given.steps // 10)
    for step, (images, targets) in enumerate(feed, 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, given.steps + 1, warmup, given.lr)
        model.train()
        losses = model(
            [image.to(given.device) for image in images],
            [{key: target[key].to(given.device) for key in ("boxes", "labels")} for target in targets],
        )
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == given.steps:
            print(f"step {step}/{given.steps}, loss {loss.item():.3f}", flush=True)

    given.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), given.out / "model.pt")
    draw(model, val, given.out / "predictions.png", given.device)
    mean, half = evaluate(model, val, given.device)
    print(
        f"mAP {100 * mean:.2f} %, at an overlap of one half {100 * half:.2f} %, of {len(val)} images; predictions in "
        f"{given.out / 'predictions.png'} (left: found, right: true)"
    )
    return mean


if __name__ == "__main__":
    main()
