"""`make bench-gpu`: on a machine with a GPU, every GPU benchmark, in pieces of at most 8 minutes that continue one another.

    python benchmarks/gpu.py                     # the pieces that are not finished, one after the other
    python benchmarks/gpu.py headline recipes    # these
    python benchmarks/gpu.py --list              # what there is, and what is finished
    python benchmarks/gpu.py --dry               # without a GPU: all pieces, with tiny models

Each piece is a process of its own with a time limit; it prints one table and writes its result file. What is finished stands in --work: the same
command goes on where it was stopped. Nothing is counted here (results/gpu-predicted.json was made without a GPU, by gpu_steps.py --predict),
and neither a network nor git is asked.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from journal import Journal

HERE = Path(__file__).parent
ROOT = HERE.parent
LEAST = 60  # s, with which a piece is begun
GRACE = 30  # s of a piece's limit for its last cell or its checkpoint
GOES_ON, TOO_LONG = 3, 124  # exit codes of a piece that its limit has stopped: one that continues, one that begins anew
SAID = {0: "finished", GOES_ON: "goes on with the same command", TOO_LONG: "did not end in its time", None: "not begun"}
TESTS = ("pytest", "pytest-timeout", "jaxtyping")
OPTIONS = (
    "-v", "-p", "no:cacheprovider", "-p", "outcomes", "-o", "addopts=--strict-markers", "--continue-on-collection-errors",
    "-W", "default",  # a warning, of another version or for another card, is no failure
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A process."""

    title: str
    command: tuple[str, ...]
    """What follows ``python``; a script of this folder takes ``--dry``, for tiny models on a CPU."""
    packages: tuple[str, ...] = ()
    """Needed beside leanmim's own."""
    continues: bool = False
    """Whether it takes ``--minutes`` and --work, and goes on where it was stopped. Others begin anew."""
    minutes: float = 8.0


def steps(name: str, title: str, *packages: str) -> Piece:
    """Cells of gpu_steps.py."""
    return Piece(title, ("gpu_steps.py", name), packages, continues=True)


def script(title: str, *command: str) -> Piece:
    """A benchmark that runs on either device."""
    return Piece(title, (*command, "--device", "cuda"))


def gpu_tests() -> Piece:
    """The tests marked ``gpu``: only the files that have some, as others import what a GPU's machine need not have."""
    files = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in file.read_text()
    ]
    return Piece("the tests that need a GPU", ("-m", "pytest", *OPTIONS, "-m", "gpu", *files), TESTS)


def photos(name: str, model: str, data: str) -> Piece:
    """A comparison of ablate.py at real scale: 200 epochs of each recipe."""
    size = model.split("_")[1]
    command = ("ablate.py", name, "--data", data, "--scale", "gpu", "--model", model)
    return Piece(f"recipes on photos, ViT-{size[0].upper()}/16: {name}", command, continues=True)


def pieces(data: str | None, dry: bool) -> dict[str, Piece]:
    """All, in the order in which they are run; comparisons on photos only with photos."""
    # a dry run counts its tiny models first, what the others compare with
    found = {"predicted": Piece("what was counted", ("gpu_steps.py", "--predict"))} if dry else {}
    found |= {
        "headline": steps("headline", "ViT-L/16 in 8 GB, ViT-H/14 in 12 GB, batch 256"),
        "transformers": steps(
            "transformers", "MAE's step against transformers', share of the card's peak", "transformers"
        ),
        "recipes": steps("recipes", "step time and peak memory of the recipes"),
        "memory": steps("memory", "ways to save memory, ViT-B/16, batch 256", "torchao"),
        "tests": gpu_tests(),
        "kernels": script("what else a step could be computed with", "kernels.py", "--batch-size", "64"),
        "hog": script("HOG", "hog_speed.py", "--step-batch-size", "64"),
    }
    for model in ("vit_small_patch16_224", "vit_base_patch16_224") if data else ():
        for name in ("photos-224", "photos-rival", "photos-one", "photos-confirmed", "photos-depths"):
            found[f"{name}-{model.split('_')[1]}"] = photos(name, model, str(data))
    if data:
        found["photos-painted"] = photos("photos-painted", "vit_small_patch16_224", data)
    return found


def missing(packages: Iterable[str]) -> list[str]:
    """Of leanmim's requirements and others, those that are not installed."""
    own = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("\n]")[0]
    found = []
    for requirement in dict.fromkeys((*re.findall(r'^ +"([^"]+)"', own, re.M), *packages)):
        try:
            metadata.version(re.split(r"[<>=~\[]", requirement)[0])
        except metadata.PackageNotFoundError:
            found.append(requirement)
    return found


def card() -> str:
    """The GPU's name; ends where there is none."""
    import torch  # not before the packages were looked for

    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch sees no CUDA device here; --dry runs all pieces with tiny models on a CPU")
    return torch.cuda.get_device_name()


def launch(command: list[str], environment: Mapping[str, str], limit: float) -> int:
    """Run a process and all that it starts, in a session that ends with it or after ``limit`` seconds.

    Returns:
        Its exit code; `TOO_LONG` where the limit has stopped it.
    """
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return TOO_LONG
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(piece: Piece, seconds: float, work: Path, dry: bool) -> int:
    """Run a piece for so long at most; its exit code."""
    command = [sys.executable, *piece.command]
    environment = {"PYTHONUNBUFFERED": "1", **os.environ}
    paths = [str(ROOT / "src"), str(HERE), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if piece.command[0].endswith(".py"):
        command[1] = str(HERE / piece.command[0])
        command += ["--dry"] if dry else []
    if piece.continues:
        command += ["--work", str(work), "--minutes", f"{(seconds - GRACE) / 60:.2f}"]
    if dry:
        environment["RESULTS"] = str(work / "results")
        environment["CUDA_VISIBLE_DEVICES"] = ""  # tests that need a GPU are skipped, on a machine with one too
    code = launch(command, environment, seconds)
    return GOES_ON if code == TOO_LONG and piece.continues else code


def main() -> None:
    """Run pieces, say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PIECE", help="default: all that are not finished")
    parser.add_argument("--photos", help="labelled folder (train/CLASS, val/CLASS), for the comparisons on photos")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of all together; each has at most 8")
    parser.add_argument("--work", type=Path, help="what is finished, to go on from; default runs/bench-gpu")
    parser.add_argument("--list", action="store_true", help="say what there is and what is finished")
    parser.add_argument("--dry", action="store_true", help="tiny models on a CPU; the results go to WORK/results")
    given = parser.parse_args()
    known = pieces(given.photos and str(Path(given.photos).resolve()), given.dry)
    if unknown := set(given.names) - known.keys():
        hint = "" if given.photos else "; those on photos need --photos (PHOTOS=...)"
        parser.error(f"there is no piece {', '.join(sorted(unknown))}; there are: {', '.join(known)}{hint}")
    work = (given.work or ROOT / "runs" / ("bench-gpu-dry" if given.dry else "bench-gpu")).resolve()
    journal = Journal(work / "journal.jsonl")
    if given.list:
        for name, piece in known.items():
            cards = dict.fromkeys(entry["device"] for entry in journal.find(ended=name, code=0))
            print(f"{name}: {piece.title}", *(f"(finished on {each})" for each in cards))
        return
    if lacking := missing(package for name in given.names or known for package in known[name].packages):
        raise SystemExit(f"bench-gpu: not installed here: {', '.join(lacking)}. Nothing was run.")
    device = "cpu" if given.dry else card()
    ended = {entry["ended"]: entry["code"] for entry in journal.find(device=device) if "ended" in entry}
    left = [name for name in known if ended.get(name) != 0]
    names = given.names or sorted(left, key=lambda name: ended.get(name) not in (None, GOES_ON))  # failed ones last
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a piece ends with this process
    end = time.monotonic() + 60 * given.minutes
    try:
        for name in names:
            seconds = min(end - time.monotonic(), 60 * known[name].minutes)
            if seconds < LEAST:
                print("bench-gpu: the time is over", flush=True)
                break
            print(f"\nbench-gpu: {name}, {known[name].title}", flush=True)
            ended[name] = run(known[name], seconds, work, given.dry)
            journal.add(ended=name, code=ended[name], device=device)
    finally:
        signal.signal(signal.SIGTERM, before)
    codes = [ended.get(name) for name in names]
    print("\n" + "\n".join(f"{name}: {SAID.get(ended.get(name), 'failed')}" for name in known))
    raise SystemExit(1 if set(codes) - {0, GOES_ON, None} else GOES_ON if any(code != 0 for code in codes) else 0)


if __name__ == "__main__":
    main()
