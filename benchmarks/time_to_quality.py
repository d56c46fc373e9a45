"""Minutes until MAE reaches a kNN accuracy, with this version and with another one, on the same machine.

    python benchmarks/time_to_quality.py --data data/imagenette --base COMMIT --accuracy 0.38

Both versions run with their defaults, one after the other, each from a checkout of its own, and measure kNN after every
epoch. The minutes are those of training: evaluation does not count.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

from leanmim.data import list_images


def run(tree: Path, data: Path, labelled: Path, out: Path, options: list[str]) -> list[dict[str, Any]]:
    """The log of a run of the version in ``tree``."""
    words = [
        "pretrain",
        "mae",
        "--data",
        str(data / "train"),
        "--knn-data",
        str(labelled),
        "--knn-every",
        "1",
        "--out",
        str(out),
    ]
    command = [sys.executable, "-m", "leanmim", *words, *options]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree / "src")}, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def points(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Minutes of training so far, and the kNN accuracy then."""
    spent, found = 0.0, []
    for line in lines:
        spent += line.get("seconds", 0.0)
        if "knn" in line:
            found.append((spent / 60, line["knn"]))
    return found


def reached(found: list[tuple[float, float]], accuracy: float) -> float | None:
    """Minutes until then, between two measures by a straight line; None if never."""
    for (before, low), (after, high) in itertools.pairwise(found):
        if high >= accuracy:
            share = (accuracy - low) / (high - low) if high > low else 1.0
            return before + max(0.0, share) * (after - before)
    return None


def images(labelled: Path) -> str:
    """How many there are, to vote and to test."""
    return " and ".join(str(len(list_images(labelled / part))) for part in ("train", "val"))


def main() -> None:
    """Train both, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="labelled folder: train/CLASS, val/CLASS")
    parser.add_argument("--knn-data", type=Path, help="of which kNN is measured; none given is --data")
    parser.add_argument("--base", required=True, help="commit of the other version")
    parser.add_argument("--accuracy", type=float, default=0.38)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--input-size", type=int, default=128)
    arguments = parser.parse_args()
    options = ["--model", arguments.model, "--input-size", str(arguments.input_size), "--epochs", str(arguments.epochs)]
    rows, raw = [], {}
    with tempfile.TemporaryDirectory() as work:
        base = Path(work) / "base"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(base), arguments.base], check=True, capture_output=True
        )
        try:
            for name, tree in (("before", base), ("now", Path(__file__).parent.parent)):
                lines = run(tree, arguments.data, arguments.knn_data or arguments.data, Path(work) / name, options)
                raw[name] = points(lines)
                minutes = reached(raw[name], arguments.accuracy)
                rows.append({
                    "version": f"{name}{f' ({arguments.base})' if name == 'before' else ''}",
                    "minutes to the accuracy": f"{minutes:.1f}" if minutes else "never",
                    "minutes in all": f"{raw[name][-1][0]:.1f}",
                    "kNN at the end, %": f"{100 * raw[name][-1][1]:.1f}",
                })  # fmt: skip
                print(rows[-1], flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], check=True)
    configuration = {
        "data": arguments.data.name, "accuracy": f"{100 * arguments.accuracy:g} %", "model": arguments.model, "input": f"{arguments.input_size} px",
        "epochs": arguments.epochs, "seeds": "one", "kNN": f"{images(arguments.knn_data or arguments.data)} images",
    }  # fmt: skip
    record.write(
        "time-to-quality-cpu", "Time to a kNN accuracy, before and now", configuration, rows, raw, "Training only."
    )


if __name__ == "__main__":
    main()
