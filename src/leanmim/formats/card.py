"""The model card: README.md beside timm's files, with the front matter that the Hugging Face hub reads.

It says how the model was made, what that cost and what was measured, in counts: no path and no file name of the user's.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import ModelCardData

from leanmim.config.base import flag
from leanmim.errors import UserError
from leanmim.files import megabytes, readable_lines, readable_object
from leanmim.formats.timm_format import timm_lines
from leanmim.names import one_line
from leanmim.page.accuracies import DEVIATION, INTERVAL, MEASURES, percent, relevant
from leanmim.run import Run
from leanmim.version import __version__

OURS = "pretrained"  # what evaluators call the encoder that they are given
NAMES = {OURS: "this model", "random": "random initialisation", "pixels": "raw pixels"}
SHOWN = 20  # names of classes
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Card:
    """What a model card is written from.

    Args:
        run: its folder; what it lacks, the card says it does not know.
        state: the checkpoint that is exported.
        description: timm's config.json of the model.
        parameters: of the model.
        license: as the hub spells it; None is not chosen yet.
        repo: OWNER/NAME on the hub; None is not known yet.
        depth: blocks or stages of an encoder.
        whole: blocks or stages of the encoder that was trained.
    """

    run: Run
    state: dict[str, Any]
    description: dict[str, Any]
    parameters: int
    license: str | None = None
    repo: str | None = None
    depth: int | None = None
    whole: int | None = None

    def __str__(self) -> str:
        parts = (
            self.front(),
            self.title(),
            *("## Training", self.training()),
            *("## Cost", self.cost()),
            *("## Accuracy", "\n\n".join(self.accuracies()) or "No accuracy of these weights was measured."),
            *("## Load it", self.load()),
            *("## License", self.license or "Not chosen yet."),
        )
        return "\n\n".join(parts) + "\n"

    @property
    def classes(self) -> list[str]:
        """What a classifier tells apart; none of an encoder."""
        return self.description.get("label_names", [])

    @property
    def config(self) -> dict[str, Any]:
        """Of the run."""
        return self.state["config"]

    def front(self) -> str:
        """YAML for the hub."""
        task = "image-classification" if self.classes else "image-feature-extraction"
        tags = ["timm", task, *([] if self.classes else ["masked-image-modeling"]), "leanmim"]
        known = ModelCardData(library_name="timm", license=self.license, pipeline_tag=task, tags=tags).to_yaml()
        hint = "" if self.license else "\n# license: choose one, for example by --license apache-2.0"
        return f"---\n{known.strip()}{hint}\n---"

    def title(self) -> str:
        """The heading, and what the model is."""
        name, recipe = self.description["architecture"], self.config.get("recipe")
        made = f"leanmim {__version__}"
        if not self.classes:
            return (
                f"# {name}, pre-trained by {recipe}\n\nAn encoder without head for timm, pre-trained on images without labels by "
                f"{made}."
            )
        names = ", ".join(map(one_line, self.classes[:SHOWN])) + (", ..." if len(self.classes) > SHOWN else "")
        return (
            f"# {name}, fine-tuned to {len(self.classes)} classes\n\nA classifier for timm, fine-tuned by {made}. "
            f"Classes: {names} (all in `config.json`, `label_names`)."
        )

    def training(self) -> str:
        """The run, as a table."""
        known = self.description["pretrained_cfg"]
        arguments = "".join(f", {key}={value}" for key, value in self.description["model_args"].items())
        rows = {
            "recipe": self.config.get("recipe"),
            "started from": self.origin(),
            "images": self.images(),
            "model": f"{self.description['architecture']}{arguments}; {self.parameters / 1e6:.1f} M parameters",
            "input": f"{' x '.join(map(str, known['input_size']))} (channels, height, width), normalised by mean "
            f"{numbers(known['mean'])} and deviation {numbers(known['std'])}",
            "epochs": f"{self.config.get('epochs')} asked for, {self.state['step']:,} steps done",
        }
        if self.depth != self.whole:
            rows["depth"] = f"the first {self.depth} of {self.whole} blocks or stages"
        if fresh := self.description["leanmim"].get("not_pretrained"):
            rows["not pre-trained"] = f"later layers, {len(fresh)} tensors (`not_pretrained` in `config.json`)"
        return table(["", ""], [[name, str(value)] for name, value in rows.items()])

    def origin(self) -> str:
        """Where training began. A name of published weights is told, a path of the user's is not."""
        start = self.config.get("start") or self.config.get("init")
        if start in (None, "scratch"):
            return "random initialisation"
        return start if is_public(start) else "weights of the authors' own"

    def images(self) -> str:
        """How many the run was trained on."""
        count = readable_object(self.run.names).get("images")
        labels = "with labels" if self.classes else "without labels"
        return "not known" if count is None else f"{count:,} {labels}"

    def cost(self) -> str:
        """What was predicted of a step, and measured in training."""
        found = readable_object(self.run.cost)
        predicted, measured = found.get("predicted") or {}, found.get("measured") or {}
        flops = predicted.get("train_flops_per_image")
        peaks = [cost.get("peak_bytes") for cost in (predicted, measured)]
        speed = measured.get("images_per_second")
        rows = [
            ["peak memory of training", *(megabytes(peak) if peak else "-" for peak in peaks)],
            ["training FLOPs an image", f"{flops / 1e9:,.3f} G" if flops else "-", "-"],
            ["images a second", "-", f"{speed:.0f}" if speed else "-"],
        ]
        return table(["", "predicted", "measured"], rows) if found else "Not known."

    def accuracies(self) -> Iterator[str]:
        """A table of a classifier's own accuracies, one of what evaluators found, and what the brackets mean."""
        found = readable_object(self.run.folder / "results.json")
        own = found.get("step") == self.state["step"] and bool(self.classes)
        if own:
            names = {"top1": "top-1 (%)", "top5": "top-5 (%)"}
            cells = [
                percent({"value": found[key], "interval": found[f"{key}_interval"]}) if found[key] is not None else "-"
                for key in names
            ]
            mean = f"{100 * found['mean_per_class']:.1f}"
            counts = [f"{found['images']:,}", str(len(found["classes"]))]
            yield table(
                [*names.values(), "mean of classes (%)", "validation images", "classes"], [[*cells, mean, *counts]]
            )
        rows = self.evaluated()
        if rows:
            encoders = dict.fromkeys([OURS, *(name for row in rows for name in row if is_known(name))])
            head = ["measure", *(f"{NAMES.get(name, name)} (%)" for name in encoders)]
            cells_of = [[percent(row[name]) if name in row else "-" for name in encoders] for row in rows]
            lines = [next(iter(row.values())) for row in rows]
            yield table(
                [*head, "validation images", "options"],
                [
                    [MEASURES.get(line["what"], line["what"]), *cells, f"{line['images']:,}", options(line)]
                    for line, cells in zip(lines, cells_of, strict=True)
                ],
            )
            yield "Measured on frozen features."
            if any("deviation" in line for line in lines):
                yield DEVIATION
        if own or rows:
            yield INTERVAL

    def evaluated(self) -> list[dict[str, dict[str, Any]]]:
        """What evaluators found of these weights: for each measure, data and options a line for each encoder by its name."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for line in [*readable_lines(self.run.evaluations), *self.online()]:
            of_other_step = line["name"] == OURS and line.get("step", self.state["step"]) != self.state["step"]
            of_other_depth = self.whole is not None and (line["options"].get("depth") or self.whole) != self.depth
            if "images" in line and not of_other_step and not of_other_depth:
                key = json.dumps([line["what"], line["data"], relevant(line, "depth")], sort_keys=True)
                found.setdefault(key, {})[line["name"]] = line
        return [row for row in found.values() if OURS in row]

    def online(self) -> Iterator[dict[str, Any]]:
        """The kNN accuracy that the log has of these weights (--knn-data), as evaluators write theirs."""
        for line in readable_lines(self.run.metrics):
            if "knn_images" in line and line["step"] == self.state["step"]:
                yield {
                    "what": "knn", "name": OURS, "data": "knn-data", "options": {}, "value": line["knn"], "images": line["knn_images"],
                    "interval": [line["knn_low"], line["knn_high"]],
                }  # fmt: skip

    def load(self) -> str:
        """Lines of Python: from the hub, and from a file."""
        head = "" if self.classes else ", num_classes=0"
        hub = f'import timm\nmodel = timm.create_model("hf-hub:{self.repo or "OWNER/NAME"}", pretrained=True{head}).eval()'
        file = timm_lines(Path("model.safetensors"), self.description)
        return f"```python\n{hub}\n```\n\nFrom the file:\n\n```python\n{file}\n```"


def check_license(license: str | None) -> None:
    """Raise UserError for what the hub cannot take as a licence."""
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(
            f"{flag('license')} {license!r} is no licence as the hub spells them: small letters, digits, dots, hyphens; as "
            "apache-2.0, mit, cc-by-4.0, or other"
        )


def is_public(name: str) -> bool:
    """Whether these are published weights, not a file or folder of the user's."""
    return not Path(name).exists() and (name.startswith("hf-hub:") or timm.is_model_pretrained(name))


def is_known(name: str) -> bool:
    """Whether an evaluated encoder may be named: it is no run of the user's."""
    return name in NAMES or is_public(name)


def options(line: dict[str, Any]) -> str:
    """Those on which a result depends."""
    return ", ".join(f"{key}={value}" for key, value in relevant(line, "depth").items()) or "-"


def numbers(values: Sequence[float]) -> str:
    """For people to read."""
    return " ".join(f"{value:.4g}" for value in values)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
