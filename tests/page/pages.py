"""Run folders without a model, and a parser of the page."""

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from leanmim.config import Finetune, Pretrain
from leanmim.recipes import MAE

VOID = {"meta", "img", "br", "input"}


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


SUFFIXES = {
    **dict.fromkeys(("environment", "labels", "results"), ".json"),
    **dict.fromkeys(("reconstructions", "confusion", "mistakes", "features", "attention", "neighbours", "map"), ".png"),
}
FINETUNE = Finetune(
    start="runs/mae",
    data="labelled",
    out="run",
    recipe="small",
    epochs=4,
    warmup_share=0.25,
    input_size=(128,),
    layer_decay=0.75,
    mixup=0.8,
)
CLASSES = ["ant", "bee", "cat"]


class Page(HTMLParser):
    """Text by table row, chart elements by chart title; asserts that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.links: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.charts: dict[str, list[str]] = {}
        self.chart: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((values.get("class") or "", []))
        elif tag in ("th", "td"):
            self.rows[-1][1].append("")
        elif tag == "svg":
            self.chart = self.charts.setdefault(values["aria-label"] or "", [])
        elif "svg" in self.open:
            self.chart.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and {"th", "td"} & set(self.open):
            self.rows[-1][1][-1] += data

    def row(self, *start: str) -> list[str]:
        """The only row whose first cells are these."""
        (found,) = [cells for _, cells in self.rows if cells[: len(start)] == list(start)]
        return found


def lines(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def metric(step: int, **more: float) -> dict[str, float]:
    """A line of metrics.jsonl; 5 steps are an epoch of 20 images."""
    speed, wait, memory = 10.0 * step, 0.01 * step, step * 2**29
    values = {"loss": 2 / step, "lr": 1e-4, "images_per_second": speed, "data_wait": wait, "memory_bytes": memory}
    return {"step": step, "epoch": step / 5, **values, "seconds": 400 / speed, **more}


def make(folder: Path, config: Pretrain | Finetune = MAE, **files: str | bytes) -> str:
    """A run folder; the suffix of a file follows from its name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    for name, content in files.items():
        suffix = SUFFIXES.get(name, ".jsonl")
        (folder / f"{name}{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def full(folder: Path, config: Pretrain = MAE) -> str:
    """A run that has everything."""
    return make(
        folder,
        replace(config, knn_data="labelled", epochs=4),
        environment=json.dumps({"device": "NVIDIA H200", "command": ["leanmim", "pretrain"]}),
        metrics=lines(metric(1), metric(5), {"step": 5, "knn": 0.25}, metric(10), {"step": 10, "knn": 0.5}),
        evaluations=lines(
            *(
                {"what": "knn", "name": name, "value": value, "data": "labelled", "options": {"k": 20, "run": "r"}}
                for name, value in (("pretrained", 0.1), ("random", 0.2), ("pixels", 0.125), ("pretrained", 0.875))
            )
        ),
        skipped=lines(*({"path": f"bad{i}.jpg", "reason": "truncated"} for i in range(12))),
        reconstructions=PIXEL,
    )


def validation(step: int, top1: float) -> dict[str, float]:
    """A line of metrics.jsonl after an epoch."""
    ends = {"val_low": top1 - 0.1, "val_high": top1 + 0.1}
    return {"step": step, "epoch": step / 5, "val_top1": top1, "val_loss": 1 - top1, **ends}


def results(**more: Any) -> str:
    """results.json of four images: an ant taken for a bee, the others right; no cat."""
    return json.dumps(
        {
            "data": "labelled", "split": "val", "step": 5, "epoch": 1.0, "weights": "best", "classes": CLASSES, "images": 4,
            "top1": 0.75, "top1_interval": [0.301, 0.954], "top5": None, "top5_interval": None, "mean_per_class": 0.8333,
            "per_class": [2 / 3, 1.0, None], "counts": [3, 1, 0], "confusion": [[2, 1, 0], [0, 1, 0], [0, 0, 0]], **more,
        }
    )  # fmt: skip


def tuned(folder: Path, config: Finetune = FINETUNE, **files: str | bytes) -> str:
    """A fine-tuning that has everything but what is given otherwise."""
    labels = {"classes": CLASSES, "train": ["a", "b", "c"], "val": list("wxyz"), "notes": ["3 of 9 labels are used"]}
    contents: dict[str, str | bytes] = {
        "environment": json.dumps({"device": "NVIDIA H200"}),
        "metrics": lines(metric(5), validation(5, 0.75), metric(10), validation(10, 0.5)),
        "labels": json.dumps(labels),
        "results": results(),
        "confusion": PIXEL,
        "mistakes": PIXEL,
    }
    return make(folder, config, **{**contents, **files})
