"""Threads that wait for each other, on a quiet and on a busy machine.

    python benchmarks/threads.py

A step of MAE is many short parallel loops. After each, libgomp's threads by default spin for a while, in case the next
begins at once. Every setting runs in a process of its own (the library reads it when it is loaded), the settings take turns;
busy: one other process of another session computes without end, as somebody else's program does.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import record
import torch

from leanmim import MAE, build
from leanmim.device import cpus
from leanmim.step import make_optimizers, update

SPINS: dict[str, dict[str, str]] = {
    "spin 300,000 (the library's own)": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1,000 (ours)": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
}


def speed(model: str, size: int, seconds: float) -> float:
    """Images/s of this process's steps."""
    config = replace(MAE, data="-", out="-", epochs=1, batch_size=32, blr=1e-4, model=model, input_size=(size,))
    built = build(config).train()
    optimizers, images = make_optimizers(built, config), torch.randn(32, 3, size, size)
    for _ in range(2):
        update(built, optimizers, [images])
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        update(built, optimizers, [images])
        steps += 1
    return 32 * steps / (time.perf_counter() - began)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Others compute meanwhile."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measured(spin: str, threads: int, arguments: argparse.Namespace) -> float:
    """`speed` in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= SPINS[spin] | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--one", "--seconds", str(arguments.seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--input-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(speed(arguments.model, arguments.input_size, arguments.seconds))
        return
    cores = cpus()
    cells = [("spin 300,000 (the library's own)", 1), *((spin, cores) for spin in SPINS)]
    raw: dict[str, list[list[float]]] = {}
    for title, others in (("quiet", 0), ("busy", 1)):
        with busy(others):
            raw[title] = [[measured(*cell, arguments) for cell in cells] for _ in range(arguments.rounds)]
    rows: list[dict[str, Any]] = []
    for place, (spin, threads) in enumerate(cells):
        row: dict[str, Any] = {"waiting": spin, "threads": threads}
        for title, rounds in raw.items():
            own = [line[place] for line in rounds]
            ratio = statistics.median(line[place] / line[1] for line in rounds)
            row |= {f"{title}, images/s": f"{statistics.median(own):.1f}", f"{title}, ratio": f"{ratio:.2f}"}
        rows.append(row)
        print(row, flush=True)
    configuration = {
        "model": arguments.model, "input": f"{arguments.input_size} px", "batch": 32, "precision": "fp32", "rounds": arguments.rounds,
        "busy": "one other process",
    }  # fmt: skip
    note = "Ratio: to the library's own with all cores, in the same round."
    record.write("threads-cpu", "Threads that wait, on a quiet and on a busy machine", configuration, rows, raw, note)


if __name__ == "__main__":
    main()
