"""Segmentation and detection from pre-trained encoders, and from scratch: examples/segment.py on CamVid, detect.py on BCCD.

    python benchmarks/dense.py segment detect --data data --start imagenette=runs/imagenette

--data holds the folders camvid and bccd. Each encoder is compared with one that is pre-trained, in the same way and on as many
images, drawn from the photos that segmentation or detection is trained with (``own``), and with random weights (``scratch``). Every cell is a process of its own with one thread. Finished cells are kept in --work: the same command
continues where it was stopped.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch

import leanmim

EXAMPLES = Path(__file__).parents[1] / "examples"


class Task(NamedTuple):
    """What is trained from an encoder.

    Args:
        example: the script.
        folder: its data, below --data.
        options: of the script.
        measure: what it returns, for the table.
    """

    example: str
    folder: str
    options: tuple[str, ...]
    measure: str


TASKS = {
    "segment": Task("segment.py", "camvid", ("--classes", "11", "--crop", "192", "256", "--width", "64", "--batch-size", "8"), "mIoU, %"),
    "detect": Task("detect.py", "bccd", ("--size", "240", "--width", "64", "--batch-size", "4"), "mAP, %"),
}  # fmt: skip


def photos(task: Task, data: Path, work: Path) -> Path:
    """The photos of the training part, in a folder of their own."""
    root = data / task.folder
    if (root / "images" / "train").is_dir():
        return root / "images" / "train"
    folder = work / f"{task.folder}-train"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (root / "ImageSets" / "Main" / "train.txt").read_text().split():
        link = folder / f"{name}.jpg"
        if not link.exists():
            link.symlink_to((root / "JPEGImages" / link.name).resolve())
    return folder


def pretrained(task: Task, arguments: argparse.Namespace) -> Path:
    """The run of ``own``, trained once, with the configuration of the first --start and on as many images."""
    run, (like, _, state) = arguments.work / f"own-{task.folder}", leanmim.restore(arguments.start[0][1])
    if not (run / "export").is_dir():
        folder = photos(task, arguments.data, arguments.work)
        epochs = round(state["step"] * like.batch_size * like.accum / len(list(folder.iterdir())), 3)
        leanmim.pretrain(
            like, data=str(folder), out=str(run), epochs=epochs, memory="auto", threads=1
        )  # fmt: skip
    return run


def measured(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train from a start and measure, in this process."""
    torch.set_num_threads(1)
    task, began = TASKS[cell["task"]], time.process_time()
    starts = dict(arguments.start) | {"own": arguments.work / f"own-{task.folder}", "scratch": "scratch"}
    line = ["--start", str(starts[cell["start"]]), *task.options, "--data", str(arguments.data / task.folder)]
    if cell["start"] == "scratch":
        line += ["--model", leanmim.restore(arguments.start[0][1])[0].model]
    out = arguments.work / "-".join(map(str, cell.values()))
    line += ["--out", str(out), "--seed", str(cell["seed"]), "--steps", str(arguments.steps), "--workers", "0"]
    value = runpy.run_path(str(EXAMPLES / task.example))["main"]([*line, "--device", "cpu"])
    return cell | {"value": value, "cpu_seconds": round(time.process_time() - began)}


def run_all(cells: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The results, of processes with one thread each, --jobs at a time."""

    def one(cell: dict[str, Any]) -> dict[str, Any]:
        file = arguments.work / f"{'-'.join(map(str, cell.values()))}.json"
        if not file.is_file():
            line = [sys.executable, __file__, *sys.argv[1:], "--cell", json.dumps(cell)]
            subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())

    with ThreadPoolExecutor(arguments.jobs) as pool:
        return list(pool.map(one, cells))


def report(name: str, results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write a task's table."""
    task, (like, _, state) = TASKS[name], leanmim.restore(arguments.start[0][1])
    rows = []
    for start in dict.fromkeys(found["start"] for found in results):
        own = [found for found in results if found["start"] == start]
        rows.append({
            "pre-trained on": start, task.measure: record.spread([found["value"] for found in own]), "seeds": len(own),
            "CPU minutes": round(sum(found["cpu_seconds"] for found in own) / len(own) / 60, 1),
        })  # fmt: skip
    configuration = {
        "model": like.model, "recipe": like.recipe, "input size": like.size[0], "decoder": f"{like.decoder_depth} x {like.decoder_width}",
        "images seen in pre-training": state["step"] * like.batch_size * like.accum, "steps": arguments.steps, "options": " ".join(task.options),
    }  # fmt: skip
    note = "± is the sample standard deviation over seeds of the training from one encoder; the photos of val are measured."
    record.write(f"{name}-{task.folder}-cpu", f"{task.example} on {task.folder}", configuration, rows, results, note)


def main() -> None:
    """Pre-train, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--start", type=lambda text: tuple(text.split("=", 1)), action="append", required=True, help="NAME=RUN"
    )
    parser.add_argument("--steps", type=int, default=400, help="of the training from each encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/dense"))
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.cell:
        cell = arguments.cell
        found = {"run": str(pretrained(TASKS[cell["task"]], arguments))} if cell["start"] == "own" and cell["seed"] is None \
            else measured(cell, arguments)  # fmt: skip
        (arguments.work / f"{'-'.join(map(str, cell.values()))}.json").write_text(json.dumps(found))
        return
    run_all([{"task": name, "start": "own", "seed": None} for name in arguments.tasks], arguments)
    for name in arguments.tasks:
        starts = ["scratch", "own", *dict(arguments.start)]
        cells = [{"task": name, "start": start, "seed": seed} for seed in range(arguments.seeds) for start in starts]
        report(name, run_all(cells, arguments), arguments)


if __name__ == "__main__":
    main()
