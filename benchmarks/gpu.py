"""`make bench-gpu`: on a machine with a GPU, the GPU tests and every GPU benchmark, within 8 minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --photos data/imagenette224

Each part is a process of its own with a share of the time; what does not finish is said, the rest still counts. With --photos: instead
the recipes of ablate.py at real scale, which go on with the next call of the same command.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
LEAST = 60  # s, with which a part is begun; half of it is for the checkpoint of one that is stopped
ENDINGS = {0: "done", 3: "goes on with the next call"}
MODELS = ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"]


def on_photos(data: str) -> dict[str, list[str]]:
    """The comparisons of ablate.py, each of which goes on where it was stopped."""
    lists = [(name, model) for model in MODELS[1:] for name in ("photos-rival", "photos-one")]
    lists.append(("photos-painted", MODELS[1]))
    return {
        f"{name}, {model}": [
            sys.executable, str(HERE / "ablate.py"), name, "--data", data, "--scale", "gpu", "--model", model,
        ]
        for name, model in lists
    }  # fmt: skip


def without_training() -> dict[str, list[str]]:
    """Tests, speed, memory."""
    parts = {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu"],
        "against transformers": [
            sys.executable, str(HERE / "vs_transformers.py"), "--device", "cuda", "--precision", "bf16",
            "--batch-size", "64", "--pairs", "15", "--models", *MODELS,
        ],
    }  # fmt: skip
    parts["predicted cost"] = [
        sys.executable, str(HERE / "cost_check.py"), "--device", "cuda", "--batches", "32", "--accums", "1",
    ]  # fmt: skip
    parts["HOG"] = [sys.executable, str(HERE / "hog_speed.py"), "--device", "cuda", "--step-batch-size", "64"]
    parts["recipes"] = [
        sys.executable, str(HERE / "recipe_costs.py"), "--device", "cuda", "--time-batch-size", "64",
        "--name", "fastmim-cost-cuda",
    ]  # fmt: skip
    for name in ("pr_mim", "bim"):
        parts[name] = [
            sys.executable, str(HERE / f"{name}.py"), "--device", "cuda", "--batch-size", "64", "--parts", "measured",
            "--models", "vit_base_patch16_224",
        ]  # fmt: skip
    parts["ViT-L and ViT-H"] = [
        sys.executable, str(HERE / "bim.py"), "--device", "cuda", "--parts", "huge", "--rounds", "2",
    ]  # fmt: skip
    return parts


def main() -> None:
    """Run the parts, say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="labelled folder of photos: compare recipes on it, 200 epochs each")
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch sees no CUDA device here")
    parts = on_photos(arguments.photos) if arguments.photos else without_training()
    end = time.monotonic() + 60 * arguments.minutes
    outcome = {}
    for name, command in parts.items():
        left = end - time.monotonic()
        if left < LEAST:
            outcome[name] = "not begun, the time was over"
            continue
        if arguments.photos:
            command += ["--minutes", f"{(left - LEAST / 2) / 60:.2f}"]
        try:
            code = subprocess.run(command, timeout=left).returncode
            outcome[name] = ENDINGS.get(code, f"failed with exit code {code}")
        except subprocess.TimeoutExpired:
            outcome[name] = f"did not finish in the {left:.0f} s that were left"
    print("\n".join(f"{name}: {how}" for name, how in outcome.items()))
    raise SystemExit(any(how != "done" for how in outcome.values()))


if __name__ == "__main__":
    main()
