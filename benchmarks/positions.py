"""Which positions suit a ViT at another input size: interpolated ones, or sine-cosine ones computed anew?

    python benchmarks/positions.py --runs runs/a runs/b runs/c --data data/imagenette

The runs are ViTs with sine-cosine positions, exported for timm, which differ in their seed. Each is loaded by timm at its
own size and at --input-size, there with both kinds of positions; kNN and a linear probe measure its frozen features.
"""

import argparse
import tempfile
from pathlib import Path

import record
import timm
import torch
from unpack import link_subset

from leanmim.data import Normalise, centre_crop, labelled_pair
from leanmim.decoder import sincos
from leanmim.encoders.backbone import Backbone
from leanmim.evaluators.features import embedding, extract
from leanmim.evaluators.knn import knn_accuracy
from leanmim.evaluators.probe import fast_probe
from leanmim.masking import Grid

POSITIONS = ("interpolated", "sine-cosine")


def exported(run: Path, size: int | None = None, positions: str = "interpolated") -> Backbone:
    """The timm model of a run, at its own size or another (px), where timm interpolates the positions."""
    arguments = {"img_size": size} if size else {}
    backbone = timm.create_model(f"local-dir:{run / 'export' / 'timm'}", pretrained=True, num_classes=0, **arguments)
    if positions == "sine-cosine":
        table = sincos(Grid(*backbone.patch_embed.grid_size), backbone.embed_dim)
        backbone.pos_embed.data[:, -len(table) :] = table
    return backbone.eval()


def accuracies(backbone: Backbone, labelled: Path) -> dict[str, float]:
    """kNN and linear probe on the mean of the patch tokens, images resized to the backbone's size."""
    found = backbone.pretrained_cfg
    normalise = Normalise(found["mean"], found["std"], torch.device("cpu"))
    embed = embedding(backbone, "avg")
    pair = labelled_pair(labelled, len(found["mean"]), centre_crop(backbone.patch_embed.img_size))
    train, val = (extract(embed, part, normalise, 100, workers=0) for part in pair)
    return {"knn": knn_accuracy(train, val), "probe": fast_probe(train, val)}


def main() -> None:
    """Measure every run, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="labelled folder: train/CLASS, val/CLASS")
    parser.add_argument("--input-size", type=int, default=224, help="px")
    parser.add_argument("--train", type=int, default=150, help="images per class")
    parser.add_argument("--val", type=int, default=100, help="images per class")
    arguments = parser.parse_args()
    raw: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        link_subset(arguments.data, Path(folder) / "data", arguments.train, arguments.val)
        for run in arguments.runs:
            own = exported(run)
            size = own.patch_embed.img_size[0]
            table = sincos(Grid(*own.patch_embed.grid_size), own.embed_dim)
            assert torch.equal(own.pos_embed[0, -len(table) :], table), f"{run} was not trained with these positions"
            for px, positions in ((size, "as trained"), *((arguments.input_size, name) for name in POSITIONS)):
                backbone = own if px == size else exported(run, px, positions)
                found = accuracies(backbone, Path(folder) / "data")
                raw.append({"run": run.name, "px": px, "positions": positions, **found})
                print(raw[-1], flush=True)
    rows = []
    for px, positions in dict.fromkeys((entry["px"], entry["positions"]) for entry in raw):
        entries = [entry for entry in raw if (entry["px"], entry["positions"]) == (px, positions)]
        rows.append({
            "input, px": px, "positions": positions, "runs": len(entries),
            "kNN, %": record.spread([entry["knn"] for entry in entries]),
            "linear probe, %": record.spread([entry["probe"] for entry in entries]),
        })  # fmt: skip
    computed, interpolated = ([e for e in raw if e["positions"] == name] for name in reversed(POSITIONS))
    change = {
        kind: record.spread([a[kind] - b[kind] for a, b in zip(computed, interpolated, strict=True)])
        for kind in ("knn", "probe")
    }
    name = arguments.data.name
    configuration = {
        "data": name, "images a class": f"{arguments.train} train, {arguments.val} val",
        "model": own.pretrained_cfg["architecture"], "features": "mean of the patch tokens",
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    note = (
        f"Sine-cosine minus interpolated, run by run: kNN {change['knn']}, linear probe {change['probe']} points. Spread: "
        "sample standard deviation over runs. kNN: k 20, cosine. Probe: logistic regression on frozen features."
    )
    record.write(f"positions-{name}-cpu", f"Positions at {arguments.input_size} px of runs at {size} px, on {name}",
                 configuration, rows, raw, note)  # fmt: skip


if __name__ == "__main__":
    main()
