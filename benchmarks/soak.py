"""A long run watched from outside: memory, open files, shared memory, throughput.

    python benchmarks/soak.py --hours 2 --data data/imagenette

A small model, so that the loop, the readers, the evaluations and the checkpoints are what works. Throughput is images for a
second of CPU time, of the run and its readers: other work on the machine does not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import record

matplotlib.use("agg")
import itertools

from matplotlib import pyplot as plt

MODEL = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-kwargs",
    "embed_dim",
    "64",
    "depth",
    "2",
    "num_heads",
    "2",
    "--input-size",
    "64",
]
SERIES = {  # what is drawn: its axis
    "rss_mib": "memory of all processes, MiB",
    "handles": "open files",
    "shared_mib": "shared memory in use, MiB",
    "images_per_cpu_second": "images per CPU second",
}


def sample(run: psutil.Process, metrics: Path) -> dict[str, Any]:
    """The state of the run and its readers now."""
    family = [run, *run.children(recursive=True)]
    own = metrics.read_text().splitlines() if metrics.exists() else []
    steps = max((json.loads(line)["step"] for line in own[-3:]), default=0)
    usage = psutil.disk_usage("/dev/shm").used if os.path.exists("/dev/shm") else 0
    found = {"rss": 0, "handles": 0, "cpu": run.cpu_times().children_user + run.cpu_times().children_system}
    for process in family:
        try:
            found["rss"] += process.memory_full_info().pss
            found["handles"] += process.num_fds()
            found["cpu"] += process.cpu_times().user + process.cpu_times().system
        except psutil.NoSuchProcess:
            continue  # a reader of the evaluation that has just ended
    return {"rss_mib": found["rss"] / 2**20, "handles": found["handles"], "cpu": found["cpu"], "steps": steps,
            "shared_mib": usage / 2**20, "processes": len(family)}  # fmt: skip


def watch(command: list[str], out: Path, hours: float, every: float, batch: int) -> list[dict[str, Any]]:
    """Samples of a run until the time is over; it is stopped by a signal then."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run, began, samples = psutil.Process(child.pid), time.monotonic(), []
    while time.monotonic() - began < hours * 3600 and child.poll() is None:
        time.sleep(every)
        if child.poll() is None:
            samples.append({"minutes": (time.monotonic() - began) / 60, **sample(run, out / "metrics.jsonl")})
    child.terminate()
    _, err = child.communicate(timeout=300)
    if child.returncode != 128 + 15:
        raise RuntimeError(f"the run ended with {child.returncode}:\n{err[-2000:]}")
    for before, now in itertools.pairwise(samples):
        spent = now["cpu"] - before["cpu"]
        now["images_per_cpu_second"] = (now["steps"] - before["steps"]) * batch / spent if spent > 0 else None
    return samples[1:]


def draw(samples: list[dict[str, Any]], file: Path) -> None:
    """One panel a series."""
    figure, axes = plt.subplots(len(SERIES), 1, figsize=(8, 9), sharex=True, layout="constrained")
    for axis, (key, label) in zip(axes, SERIES.items(), strict=True):
        axis.plot([s["minutes"] for s in samples], [s[key] for s in samples], lw=1)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=100)


def main() -> None:
    """Watch, draw, write the table of the first and the last quarter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two samples")
    parser.add_argument(
        "--data", type=Path, help="labelled folder: train/CLASS, val/CLASS; without one the demo's photos"
    )
    parser.add_argument("--images", type=int, default=40, help="of each class, for the evaluation")
    given = parser.parse_args()
    batch = 16
    with tempfile.TemporaryDirectory() as work:
        out, labelled = Path(work) / "run", Path(work) / "labelled"
        for part in ("train", "val"):
            for folder in sorted((given.data / part).iterdir()):
                (labelled / part / folder.name).mkdir(parents=True)
                for file in sorted(folder.iterdir())[: given.images]:
                    (labelled / part / folder.name / file.name).symlink_to(file.resolve())
        command = [
            sys.executable, "-m", "leanmim", "pretrain", "mae", "--data", str(labelled / "train"), "--out", str(out), *MODEL,
            "--epochs", "1000000", "--batch-size", str(batch), "--blr", "1e-4", "--workers", "2", "--device", "cpu", "--log-every", "5",
            "--checkpoint-minutes", "1", "--knn-data", str(labelled), "--knn-every", "20",
        ]  # fmt: skip
        samples = watch(command, out, given.hours, given.every, batch)
        knn = sum("knn" in json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    quarter = max(1, len(samples) // 4)
    rows = []
    for key, label in SERIES.items():
        first, last = ([s[key] for s in part if s[key] is not None] for part in (samples[:quarter], samples[-quarter:]))
        rows.append({"": label, "first quarter, mean": f"{sum(first) / len(first):.1f}", "last quarter, mean": f"{sum(last) / len(last):.1f}",
                     "most": f"{max(s[key] for s in samples if s[key] is not None):.1f}"})  # fmt: skip
    configuration = {"hours": given.hours, "steps": samples[-1]["steps"], "kNN evaluations": knn, "checkpoints": "one a minute",
                     "batch": batch, "readers": 2}  # fmt: skip
    record.write("soak-cpu", "A long run", configuration, rows, samples)
    draw(samples, record.RESULTS / "soak-cpu.png")


if __name__ == "__main__":
    main()
