"""Loss curves of the fast paths beside the plain one: decoding, half precision, compilation.

    python benchmarks/fast_paths.py --data data/imagenette/train

Each variant trains MAE from the same seed on the same images in the same order. Bounds: the difference of the smoothed curves
(mean of ten steps), beside that of another seed, which is what such differences are by chance.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import record

import leanmim

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast decode": dict(decode="fast"),
    "bf16": dict(precision="bf16"),
    "compiled": dict(compile=True),
    "all fast": dict(decode="fast", precision="bf16", compile=True),
    "another seed": dict(seed=1),
}
SMOOTH = 10  # steps


def curve(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The loss of every step, and the images/s of the later half."""
    plain = dict(decode="exact", precision="fp32", compile=False, seed=0)
    config = replace(
        leanmim.MAE, data=arguments.data, out=str(folder / name), model=arguments.model, input_size=(arguments.input_size,),
        epochs=1, batch_size=32, blr=8 * 8.5e-4, workers=1, log_every=1, channels_last=False, threads=arguments.threads,
        **plain | VARIANTS[name],
    )  # fmt: skip
    leanmim.pretrain(config)
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]
    return {
        "losses": [line["loss"] for line in steps],
        "speed": median(line["images_per_second"] for line in steps[len(steps) // 2 :]),
    }


def smoothed(losses: list[float]) -> list[float]:
    """Means of some steps each."""
    return [mean(losses[start : start + SMOOTH]) for start in range(0, len(losses) - SMOOTH + 1, SMOOTH)]


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--input-size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.one:
            print(json.dumps(curve(arguments.one, arguments, Path(folder))))
            return
        curves = {}
        for name in arguments.variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            curves[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, curves[name]["losses"][-1], curves[name]["speed"], flush=True)
    plain = smoothed(curves["plain"]["losses"])
    rows = []
    for name, found in curves.items():
        losses = found["losses"]
        apart = [abs(a - b) / b for a, b in zip(smoothed(losses), plain, strict=True)]
        rows.append({
            "path": name, "steps": len(losses), "last ten steps": f"{smoothed(losses)[-1]:.4f}",
            "mean difference, %": f"{100 * mean(apart):.3f}", "largest, %": f"{100 * max(apart):.3f}",
            "images/s": f"{found['speed']:.1f}", "to plain": f"{found['speed'] / curves['plain']['speed']:.2f}",
        })  # fmt: skip
    configuration = {"data": Path(arguments.data).resolve().parent.name, "model": arguments.model, "input": f"{arguments.input_size} px", "batch": 32,
                     "threads": arguments.threads}  # fmt: skip
    note = (
        "Plain: images decoded whole, fp32, not compiled. Differences of the mean loss of ten steps each from plain's."
    )
    record.write("fast-paths-cpu", "Loss curves of fast and plain paths", configuration, rows, curves, note)


if __name__ == "__main__":
    main()
