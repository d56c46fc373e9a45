"""What was tried and what survived: kills, signals, full disks, mutated photos, manipulated checkpoints, wrong command lines,
faults of one process of several.

    python benchmarks/trust.py                      # all, about an hour
    python benchmarks/trust.py kills disk --share 0.1

Every trial is a real one, on tiny models and the photos in demo/: a process is killed, a file system is full. What is done in
a process of its own is forked from this one, which has imported leanmim already.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import fuzz
import record
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import process_faults, wrong_lines
from tests.helpers import PHOTOS, equal, growing, small
from tests.manipulated import manipulated
from tests.runs import arguments, labelled, lines

from leanmim.cli import main as leanmim
from leanmim.config import Pretrain
from leanmim.data import open_source
from leanmim.errors import UserError
from leanmim.processes import ALONE
from leanmim.recipes import BIM, FASTMIM_P, MAE, PR_MIM, SIMMIM
from leanmim.run import Run, load, save
from leanmim.start import open_start
from leanmim.train.phases import plan_phases
from leanmim.train.training import begin
from leanmim.weights import restore

HANG = 300  # s without an end
Trials = Iterator[
    tuple[str, str]
]  # a fault, and what came of it: survived, lost, traceback or hang, with what was said


class Ended(NamedTuple):
    """How a process ended."""

    code: int | None  # None: it hung, or was killed
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """All that it said."""
        return self.out + self.err


def forked(
    words: list[str], folder: Path, send: int = signal.SIGKILL, after: float | None = None, limit: int | None = None
) -> Ended:
    """Run a command line in a process group of its own.

    Args:
        words: what follows `leanmim`.
        folder: to be in; what the process says is kept beside it.
        send: a signal that is sent ``after`` so many seconds, SIGKILL to the whole group; a process that has not ended
            after `HANG` is killed.
        limit: bytes that no file may exceed.
    """
    logs = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    began = time.perf_counter()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, log in enumerate(logs, start=1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 1
        try:
            leanmim(words)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # it was faster
        os.setpgid(pid, pid)
    code, sent = None, after is None
    while code is None and time.perf_counter() - began < HANG:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif not sent and time.perf_counter() - began >= after:
            sent = True
            if send == signal.SIGKILL:
                break
            os.kill(pid, send)
        else:
            time.sleep(0.001)
    if code is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    out, err = (log.read_text(errors="replace") for log in logs)
    return Ended(code, out, err, time.perf_counter() - began)


class Writer(NamedTuple):
    """A command that writes."""

    name: str
    words: list[str]
    out: Path
    same: Callable[[Path, Path], bool]  # whether its output is that of the run that nobody disturbed


def same_run(one: Path, two: Path) -> bool:
    """Weights, optimizers, export and log of two runs, and nothing half written."""
    states = [load(Run(folder).last) for folder in (one, two)]
    keys = {"step", "model", "optimizers", "best", "classes"}
    logs = [[(line["step"], line.get("loss"), line.get("val_top1")) for line in lines(Pretrain(data="", out=str(folder)))]
            for folder in (one, two)]  # fmt: skip
    exports = [(folder / "export" / "timm" / "model.safetensors").read_bytes() for folder in (one, two)]
    return (
        equal(*({key: value for key, value in state.items() if key in keys} for state in states))
        and logs[0] == logs[1]
        and exports[0] == exports[1]
        and not half_written(one)
    )


def half_written(folder: Path) -> list[Path]:
    """Temporary files."""
    return [path for path in folder.rglob("*") if path.suffix in (".part", ".tmp")]


def same_files(one: Path, two: Path) -> bool:
    """Two files, or two folders of them."""
    if one.is_file():
        return one.read_bytes() == two.read_bytes()
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in (one, two)]
    return names[0] == names[1] and all(same_files(one / name, two / name) for name in names[0])


def same_names(one: Path, two: Path) -> bool:
    """Two folders with the same files; ONNX has the time in it."""
    return sorted(p.relative_to(one) for p in one.rglob("*")) == sorted(p.relative_to(two) for p in two.rglob("*"))


def writers(work: Path) -> Iterator[Writer]:
    """Every command that writes; later ones take what `undisturbed` has left of the first ones."""
    common: dict[str, Any] = dict(
        data=str(PHOTOS), device="cpu", log_every=1, checkpoint_minutes=0.0, blr=0.01, effective_batch=4
    )
    mae = small(MAE, **common, epochs=6, batch_size=4, workers=0)
    configs = {
        "pretrain mae": mae,
        "pretrain mae, 2 readers": replace(mae, workers=2),
        "pretrain simmim": replace(small(SIMMIM, **common, epochs=6, batch_size=4, workers=0), input_size=(32,)),
        "pretrain pr-mim": replace(small(PR_MIM, **common, epochs=6, batch_size=4, workers=0)),
        "pretrain bim": replace(small(BIM, **common, epochs=6, batch_size=4, workers=1), segments=2, mask_ratio=0.75),
        "pretrain fastmim-p": replace(growing(mae), checkpoint_minutes=0.0, recipe=FASTMIM_P.recipe),
    }
    for name, config in configs.items():
        out = work / name.replace(" ", "-").replace(",", "")
        yield Writer(name, arguments(replace(config, out=str(out))), out, same_run)
    data = labelled(work / "labelled", 8)
    out = work / "finetune"
    yield Writer(
        "finetune",
        ["finetune", f"{work}/pretrain-mae-whole", "--data", str(data), "--out", str(out), "--epochs", "6", "--batch-size", "4",
         "--workers", "0", "--device", "cpu", "--log-every", "1", "--checkpoint-minutes", "0"],
        out, same_run,
    )  # fmt: skip
    for suffix in ("npy", "parquet"):
        out = work / f"features-{suffix}" / f"features.{suffix}"
        yield Writer(
            f"embed .{suffix}",
            ["embed", f"{work}/pretrain-mae-whole", "--data", str(PHOTOS), "--out", str(out), "--batch-size", "2", "--workers",
             "0", "--device", "cpu"],
            out, same_files,
        )  # fmt: skip
    out = work / "predictions.csv"
    yield Writer(
        "predict",
        ["predict", f"{work}/finetune-whole", str(PHOTOS), "--out", str(out), "--device", "cpu", "--workers", "0", "--overwrite"],
        out, same_files,
    )  # fmt: skip
    out = work / "pack" / "photos.tar"
    yield Writer("pack", ["pack", str(PHOTOS), "--size", "64", "--out", str(out), "--workers", "0"], out, same_files)
    for form in ("timm", "onnx"):
        out = work / f"export-{form}"
        yield Writer(
            f"export {form}",
            ["export", f"{work}/pretrain-mae-whole", "--format", form, "--out", str(out), "--overwrite"],
            out, same_files if form == "timm" else same_names,
        )  # fmt: skip


def moved(writer: Writer, out: Path) -> Writer:
    """The same command with another output."""
    return writer._replace(words=[str(out) if word == str(writer.out) else word for word in writer.words], out=out)


def undisturbed(writer: Writer, folder: Path) -> tuple[Path, float]:
    """What the command leaves where nothing happens, and the seconds it took."""
    out = writer.out.with_name(f"{writer.out.stem}-whole{writer.out.suffix}")
    ended = forked(moved(writer, out).words, folder)
    if ended.code:
        raise RuntimeError(f"{writer.name} fails without any fault:\n{ended.text}")
    return out, ended.seconds


def remove(out: Path) -> None:
    """The output, and what an unfinished command has left beside it."""
    for path in [path for path in out.parent.iterdir() if path.name.startswith(out.stem) and "-whole" not in path.name]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def judged(ended: Ended, kept: bool = True) -> str:
    """An outcome, with the end of what a bad one said."""
    outcome = (
        "hang" if ended.code is None else "traceback" if "Traceback" in ended.text else "survived" if kept else "lost"
    )
    return outcome if outcome == "survived" else f"{outcome}: {ended.text[-2000:]}"


def kills(work: Path, share: float, seed: int, only: str = "") -> Trials:
    """SIGKILL at random moments, three times in a row, then the command is left to end."""
    draw = random.Random(seed)
    for writer in (writer for writer in writers(work) if writer.name.startswith(only)):
        expected, seconds = undisturbed(writer, work)
        for _ in range(max(1, round(6 * share))):
            remove(writer.out)
            for _ in range(3):
                ended = forked(writer.words, work, after=draw.uniform(0, seconds))
                if ended.code is None:
                    yield f"SIGKILL: {writer.name}", "traceback" if "Traceback" in ended.text else "survived"
            ended = forked(writer.words, work)
            yield f"continued: {writer.name}", judged(ended, ended.code == 0 and writer.same(writer.out, expected))


def signals(work: Path, share: float, seed: int, only: str = "") -> Trials:
    """SIGTERM, SIGINT or SIGHUP at a random moment: it ends with a message and the signal's exit code; then it is continued."""
    draw = random.Random(seed)
    for writer in (writer for writer in writers(work) if writer.name.startswith(only)):
        expected, seconds = undisturbed(writer, work)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) * max(1, round(2 * share)):
            remove(writer.out)
            ended = forked(writer.words, work, number, draw.uniform(0, seconds))
            yield f"{number.name}: {writer.name}", judged(ended, ended.code in (0, 128 + number, -number))
            ended = forked(writer.words, work)
            yield f"continued: {writer.name}", judged(ended, ended.code == 0 and writer.same(writer.out, expected))


def disk(work: Path, share: float, seed: int, only: str = "") -> Trials:
    """A file system that gets full at a random moment, or a limit on the size of a file; then there is space."""
    draw, place = random.Random(seed), work / "small"
    place.mkdir()
    for writer in (writer for writer in writers(work) if writer.name.startswith(only)):
        expected, _ = undisturbed(writer, work)
        size = sum(path.stat().st_size for path in (expected, *expected.rglob("*")) if path.is_file())
        here = moved(writer, place / writer.out.name)
        for trial in range(max(1, round(4 * share))):
            small = trial % 2 == 0 and mounts()
            limit = max(4096, int(draw.uniform(0, 1.2 if small else 0.6) * size))
            if small:
                mount(place, limit)
                ended, what = forked(here.words, work), "full file system"
            else:
                ended, what = forked(here.words, work, limit=limit), "limit of a file's size"
            yield f"{what}: {writer.name}", judged(ended)
            if small:
                mount(place, 2**30, "remount")
            ended = forked(here.words, work)
            yield f"then with space: {writer.name}", judged(ended, ended.code == 0 and writer.same(here.out, expected))
            if small:
                subprocess.run(["umount", str(place)], check=True)
            else:
                remove(here.out)


def photos(work: Path, share: float, seed: int) -> Trials:
    """Mutated pictures, read in a process of bounded memory."""
    for start in range(0, max(1, round(20_000 * share)), 1000):
        found = fuzz.survey(min(1000, max(1, round(20_000 * share)) - start), seed + start)
        for what, outcome in (("readable", "survived"), ("bad", "survived"), ("crash", "traceback"), ("hang", "hang")):
            for _ in range(found[what]):
                yield f"mutated photo, {what}", outcome


def checkpoints(work: Path, share: float, seed: int) -> Trials:
    """Checkpoints that a stranger has changed: refused with a message, or as good as before."""
    first = {writer.name: writer for writer in writers(work)}
    for name, kind in (("pretrain mae", "pre-training"), ("pretrain bim", "block-wise"), ("finetune", "fine-tuning")):
        folder, _ = undisturbed(first[name], work)
        run = Run(folder)
        state = load(run.last)
        whole = list(manipulated(state))
        config = Pretrain.from_json(run.stored()) if "classes" not in state else None
        for what, make in random.Random(seed).sample(whole, min(len(whole), max(1, round(120 * share)))):
            for path in run.last.parent.glob("last-*.pt"):
                path.unlink()
            torch.save(make(), run.last)
            for reader in ("restore", "continue", "start"):
                outcome = "survived"
                try:
                    if reader == "start":
                        open_start(str(run.last)).encoder()
                    elif config and reader == "restore":
                        restore(folder)
                    elif config:
                        source = open_source(config.data, config.channels)
                        plan = plan_phases(config, len(source), 1)
                        begin(config, plan, source, run.to_resume(config), torch.device("cpu"), ALONE)
                    else:
                        load(run.last, resume=reader == "continue")
                except UserError:
                    pass
                except Exception as error:
                    outcome = f"traceback: {reader}, {what}: {type(error).__name__}: {error}"
                yield f"manipulated checkpoint of {kind}", outcome
        save(run.last, state)


def command_lines(work: Path, share: float, seed: int) -> Trials:
    """Wrong command lines: one message, exit code 2, nothing written."""
    place = work / "here"
    place.mkdir()
    wrong_lines.prepare(place)
    whole = wrong_lines.wrong_lines()
    for line in random.Random(seed).sample(whole, max(1, round(len(whole) * share))):
        before = wrong_lines.contents(place)
        ended = forked(line, place)
        wrong = wrong_lines.judged(ended.code, ended.err, wrong_lines.contents(place) - before)
        kind = "hang" if ended.code is None else "traceback" if "Traceback" in ended.text else "lost"
        yield f"wrong command line: {line[0]}", f"{kind}: {' '.join(line)}: {wrong}" if wrong else "survived"


def processes(work: Path, share: float, seed: int) -> Trials:
    """Faults of one process of several."""
    whole = process_faults.SCENARIOS
    for scenario in random.Random(seed).sample(whole, max(1, round(len(whole) * min(share, 1)))):
        folder = work / scenario.name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        wrong = process_faults.attempt(scenario, folder)
        kind = "traceback" if "Traceback" in wrong else "lost"
        yield f"several processes: {scenario.name}", f"{kind}: {wrong}" if wrong else "survived"


def mounts() -> bool:
    """Whether this process may mount a file system."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def mount(place: Path, size: int, *options: str) -> None:
    """A file system in memory, of so many bytes."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(place)], check=True
    )


EXPERIMENTS: dict[str, Callable[..., Trials]] = {
    "kills": kills,
    "signals": signals,
    "disk": disk,
    "photos": photos,
    "checkpoints": checkpoints,
    "lines": command_lines,
    "processes": processes,
}


def table(found: dict[str, Counter[str]]) -> list[dict[str, Any]]:
    """A row for every fault, and their sum."""
    outcomes = ("survived", "lost", "traceback", "hang")
    rows = [
        {"fault": fault, "tried": counts.total(), **{key: counts[key] for key in outcomes}}
        for fault, counts in found.items()
    ]
    whole = sum(found.values(), Counter())
    return [*rows, {"fault": "all", "tried": whole.total(), **{key: whole[key] for key in outcomes}}]


def main() -> None:
    """Run the experiments; each writes its table when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kills, signals, disk: commands that begin so, for example pack")
    given = parser.parse_args()
    torch.set_num_threads(1)
    more = {"only": given.only} if given.only else {}
    for name in given.names or EXPERIMENTS:
        found: dict[str, Counter[str]] = {}
        worst: list[str] = []
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            (place := Path(work) / name).mkdir()
            for fault, outcome in EXPERIMENTS[name](place, given.share, given.seed, **more):
                kind = outcome.partition(":")[0]
                found.setdefault(fault, Counter())[kind] += 1
                if kind != "survived":
                    worst.append(f"{fault}: {outcome}".replace(work, "WORK"))
                    print(worst[-1], flush=True)
        settings = {"share of the trials": given.share, "seed": given.seed, "seconds": round(time.monotonic() - began)}
        record.write(
            f"trust-{name}{f'-{given.only}' if given.only else ''}{f'-seed{given.seed}' if given.seed else ''}-cpu",
            f"Tried and survived: {name}",
            settings,
            table(found),
            worst,
        )


if __name__ == "__main__":
    main()
