"""Seconds from the command to the first step, of folders of 1,000 and 100,000 images, and the memory of a reader.

    python benchmarks/start.py

The folders hold hard links of a few JPEGs of 160 x 120 px, fifty folders of them; they lie in a temporary folder. Every run is a
process of its own: one that begins, and, after a signal to stop, one that continues. What is reported is the median of the
rounds. A reader's own memory is what the system would get back if it ended (unique set size): after the first step, and some
hundred steps later.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import record
from PIL import Image

COUNTS = (1000, 100_000)
MIB = 2**20


def fill(folder: Path, count: int) -> None:
    """So many images, of eight files."""
    folder.mkdir()
    files = [folder.parent / f"{number}.jpg" for number in range(8)]
    for number, file in enumerate(files):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(file)
    for number in range(count):
        inside = folder / f"class{number % 50:03d}"
        inside.mkdir(exist_ok=True)
        os.link(files[number % 8], inside / f"image_{number:07d}.jpg")
    for file in files:
        file.unlink()


def command(data: Path, out: Path, count: int) -> list[str]:
    """Of a run that logs every step and has some thousand steps, whatever the number of images."""
    return [
        sys.executable, "-m", "leanmim", "pretrain", "mae", "--data", str(data), "--out", str(out), "--model",
        "vit_tiny_patch16_224", "--input-size", "96", "--batch-size", "32", "--epochs", str(100_000 // count), "--log-every", "1",
        "--workers", "1", "--device", "cpu",
    ]  # fmt: skip


def steps(out: Path) -> int:
    """The last step in the log."""
    log = out / "metrics.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def run(data: Path, out: Path, count: int, more: int) -> dict[str, float]:
    """Start a run, measure it, and stop it by a signal.

    Args:
        data: the images.
        out: the run folder.
        count: of the images.
        more: steps after the first one, until the reader is measured again.

    Returns:
        Seconds to the first step, and the reader's own memory after that and after the other steps, bytes.
    """
    before, start = steps(out), time.perf_counter()
    process = subprocess.Popen(command(data, out, count), stdout=subprocess.DEVNULL)
    found: dict[str, float] = {}
    for name, goal in (("first", before + 1), ("later", before + 1 + more)):
        while steps(out) < goal:
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode}")
            time.sleep(0.02)
        found.setdefault("seconds", time.perf_counter() - start)
        found[name] = max(child.memory_full_info().uss for child in psutil.Process(process.pid).children())
    process.send_signal(signal.SIGTERM)
    process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="between the two measurements of the reader")
    parser.add_argument("--name", default="start-cpu")
    arguments = parser.parse_args()
    rows, raw = [], {}
    with TemporaryDirectory() as folder:
        for count in COUNTS:
            data, out = Path(folder, f"photos{count}"), Path(folder, "run")
            fill(data, count)
            measured: dict[str, list[dict[str, float]]] = {"new": [], "continued": []}
            for _ in range(arguments.rounds):
                shutil.rmtree(out, ignore_errors=True)
                for kind, runs in measured.items():
                    runs.append(run(data, out, count, arguments.steps if kind == "new" else 0))
            raw[str(count)] = measured
            middle = {
                kind: {key: median(one[key] for one in runs) for key in runs[0]} for kind, runs in measured.items()
            }
            rows.append(
                {
                    "images": f"{count:,}",
                    "first step, s": f"{middle['new']['seconds']:.1f}",
                    "continued, s": f"{middle['continued']['seconds']:.1f}",
                    "a reader's own memory, MiB": f"{middle['new']['first'] / MIB:.0f}",
                    f"{arguments.steps} steps later": f"{middle['new']['later'] / MIB:.0f}",
                }
            )
    configuration = {
        "rounds": arguments.rounds,
        "model": "vit_tiny_patch16_224",
        "input": "96 px, batch 32, one reader",
    }
    record.write(arguments.name, "From the command to the first step", configuration, rows, raw)


if __name__ == "__main__":
    main()
