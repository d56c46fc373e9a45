"""Run folders without a model, and a parser of the page."""

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from leanmim.config import Pretrain
from leanmim.recipes import MAE

VOID = {"meta", "img", "br"}


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Text by table row, chart elements by chart title; asserts that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.links: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.charts: dict[str, list[str]] = {}
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
            self.charts[values["aria-label"] or ""] = []
        elif "svg" in self.open:
            self.charts[list(self.charts)[-1]].append(tag)

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


def make(folder: Path, config: Pretrain = MAE, **files: str | bytes) -> str:
    """A run folder; the suffix of a file follows from its name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    for name, content in files.items():
        suffix = {"environment": ".json", "reconstructions": ".png"}.get(name, ".jsonl")
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
