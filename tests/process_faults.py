"""What can happen to a training in several processes, each tried for real: `SCENARIOS` and `attempt`.

The processes find each other in a store as torchrun keeps one.
"""

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from tests.forks import launch
from tests.helpers import PHOTOS
from tests.runs import labelled

MODEL = "--model vit_tiny_patch16_224 --model-kwargs patch_size 8 embed_dim 32 depth 4 num_heads 2 --input-size 32"
SMALL = f"{MODEL} --decoder-depth 1 --decoder-width 32 --decoder-heads 2 --blr 1e-3"
LOOP = "--device cpu --workers 0 --log-every 1 --checkpoint-minutes 0"
MAE = f"pretrain mae {SMALL} {LOOP}"
BIM = f"pretrain bim {SMALL} {LOOP}"
FINETUNE = f"finetune scratch {MODEL} {LOOP} --recipe small"
TIMEOUT = 0.15  # minutes


@dataclass
class Ended:
    """How the processes of one command ended."""

    codes: list[int]
    texts: list[str]
    """Standard output and error of each."""
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether every process that was left ended well, or with one message."""
        return all(
            code == 0 or (code == 2 and text.count("leanmim: ") == 1 and "Traceback" not in text)
            for code, text in zip(self.codes, self.texts, strict=True)
            if code not in (-signal.SIGKILL, -signal.SIGSTOP)
        )


@dataclass(frozen=True)
class Fault:
    """What happens to one of the processes.

    Args:
        what: the name of a function below.
        rank: whom it happens to.
        step: before the optimizer's step of which it happens, from 1; 0 is at the start.
        where: ``step``, or ``evaluation``.
    """

    what: str
    rank: int = 1
    step: int = 3
    where: str = "step"


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def out_of_memory() -> None:
    raise MemoryError


def out_of_tensors() -> None:
    torch.empty(2**60)


def asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def full_disk() -> None:
    """From now on nothing large can be written."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.save = refuse


def killed_in_a_checkpoint() -> None:
    """The second one, when its own shares are written and nobody else knows."""
    from torch.distributed.checkpoint import FileSystemWriter

    write, calls = FileSystemWriter.write_data, 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        done = write(*arguments, **named)
        return done if calls < 2 else killed()

    FileSystemWriter.write_data = counted  # type: ignore[method-assign]


def hurried() -> None:
    """Its clock says that a checkpoint is due, at every step."""
    import leanmim.loop

    clock = SimpleNamespace(perf_counter=lambda: 1e6 * time.perf_counter())
    leanmim.loop.time = clock  # type: ignore[assignment]


def strike(fault: Fault) -> None:
    """Let the fault happen in this process when its time comes."""
    act: Callable[[], None] = globals()[fault.what]
    if fault.where == "evaluation":
        from leanmim.train.training import Training

        Training.knn = lambda *_: act()  # type: ignore[method-assign,assignment]
        return
    if not fault.step:
        act()
        return
    step, done = torch.optim.AdamW.step, 0

    def counted(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
        nonlocal done
        done += not isinstance(self.param_groups[0]["params"][0], FakeTensor)  # of those the cost is counted
        if done == fault.step:
            act()
        return step(self, *arguments, **named)

    torch.optim.AdamW.step = counted  # type: ignore[method-assign]


def all_that_happen_to(rank: int, faults: list[Fault], first: Callable[[], None] | None) -> None:
    """What is done in every process, and those faults that are this one's."""
    if first:
        first()
    for fault in faults:
        if fault.rank == rank:
            strike(fault)


def together(
    folder: Path,
    words: list[str],
    world: int = 2,
    faults: list[Fault] = (),
    each: list[str] | None = None,
    limit: float = 300,
    first: Callable[[], None] | None = None,
) -> Ended:
    """Run a command in several processes. One that is stopped is killed when all others have ended.

    Args:
        folder: for what they print.
        words: what follows ``leanmim``.
        world: processes.
        faults: that happen to them.
        each: for each process more options.
        limit: seconds; more is a hang.
        first: called in each process before the command; it must pickle.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outputs = [folder / f"output-{rank}.txt" for rank in range(world)]
    began = time.monotonic()
    ranks = []
    for rank in range(world):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        own = [*words, *(each[rank].split() if each else [])]
        ranks.append(launch(own, outputs[rank], environment, partial(all_that_happen_to, rank, list(faults), first)))
    frozen = {fault.rank for fault in faults if fault.what == "stopped"}
    codes: dict[int, int] = {}
    while len(codes) < world:
        for rank, process in enumerate(ranks):
            if rank not in codes and not process.is_alive():
                codes[rank] = process.exitcode or 0
        late = time.monotonic() - began > limit
        if late or codes.keys() | frozen == set(range(world)):
            for rank in set(range(world)) - codes.keys():
                ranks[rank].kill()
                codes[rank] = -signal.SIGSTOP if rank in frozen else -signal.SIGALRM
        time.sleep(0.02)
    for process in ranks:
        process.join()
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in outputs]
    return Ended([codes[rank] for rank in range(world)], texts, time.monotonic() - began)


def steps(folder: Path) -> list[tuple[int, float]]:
    """Step and learning rate of every line of the log."""
    log = folder / "metrics.jsonl"
    lines = map(json.loads, log.read_text().splitlines() if log.is_file() else [])
    return [(line["step"], line["lr"]) for line in lines if "lr" in line]


@dataclass(frozen=True)
class Scenario:
    """A command, what happens to it, and what must come of it."""

    name: str
    command: str
    faults: list[Fault] = field(default_factory=list)
    said: str = ""
    """By the processes that are left; each must say it."""
    codes: tuple[int, ...] = (2, 2)
    """Exit codes; of the one that is lost its signal, negative."""
    continues: bool = True
    """Whether the same command then ends the run."""
    each: tuple[str, ...] = ()
    world: int = 2


KILLED, STOPPED = -signal.SIGKILL, -signal.SIGSTOP
TERM = 128 + signal.SIGTERM
SILENT = f"has not answered for {TIMEOUT:g} minutes"
KNN = "--knn-data {labelled} --knn-every 1"
SCENARIOS = [
    Scenario("rank 1 killed", MAE, [Fault("killed", 1)], "rank 1 of 2 processes", (2, KILLED)),
    Scenario("rank 0 killed", MAE, [Fault("killed", 0)], "rank 0 of 2 processes", (KILLED, 2)),
    Scenario("rank 2 of 3 killed", MAE, [Fault("killed", 2)], "rank 2 of 3 processes", (2, 2, KILLED), world=3),
    Scenario("rank 1 killed before the first step", MAE, [Fault("killed", 1, 1)], "rank 1 of 2 processes", (2, KILLED)),
    Scenario("rank 1 stopped", MAE, [Fault("stopped", 1)], "rank 1 of 2 processes", (2, STOPPED)),
    Scenario("rank 0 stopped", MAE, [Fault("stopped", 0)], "rank 0 of 2 processes", (STOPPED, 2)),
    Scenario("rank 1 out of memory", MAE, [Fault("out_of_memory", 1)], "out of memory on cpu (MemoryError)"),
    Scenario("rank 0 cannot allocate a tensor", MAE, [Fault("out_of_tensors", 0)], "out of memory on cpu"),
    Scenario("rank 0 killed while it evaluates", f"{MAE} {KNN}", [Fault("killed", 0, 0, "evaluation")], SILENT, (KILLED, 2)),
    Scenario("rank 0 stopped while it evaluates", f"{MAE} {KNN}", [Fault("stopped", 0, 0, "evaluation")], SILENT, (STOPPED, 2)),
    Scenario("SIGTERM to all", MAE, [Fault("asked_to_stop", 0), Fault("asked_to_stop", 1)], "the same command continues", (TERM, TERM)),
    Scenario("SIGTERM to rank 1 only", MAE, [Fault("asked_to_stop", 1)], "the same command continues", (TERM, TERM)),
    Scenario("full disk on rank 0", MAE, [Fault("full_disk", 0)], "No space left on device"),
    Scenario("other images on rank 1", MAE, [], "not all 2 processes see the same images in --data: other than rank 0 does rank 1",
             continues=False, each=("", "--data {fewer}")),
    Scenario("a few bad files on rank 1", MAE, [], "", (0, 0), each=("", "--data {damaged}")),
    Scenario("nothing but bad files on rank 1", MAE, [], "of the 16 image files can be read", continues=False,
             each=("", "--data {rubbish}")),
    Scenario("block-wise, rank 1 killed", BIM, [Fault("killed", 1, 9)], "rank 1 of 2 processes", (2, KILLED)),
    Scenario("block-wise, rank 1 stopped", BIM, [Fault("stopped", 1, 9)], "rank 1 of 2 processes", (2, STOPPED)),
    Scenario("fine-tuning, rank 1 killed", FINETUNE, [Fault("killed", 1)], "rank 1 of 2 processes", (2, KILLED)),
    Scenario("fine-tuning, rank 0 stopped", FINETUNE, [Fault("stopped", 0)], "rank 0 of 2 processes", (STOPPED, 2)),
    Scenario("fine-tuning, rank 1 out of memory", FINETUNE, [Fault("out_of_memory", 1)], "out of memory on cpu"),
    Scenario("fine-tuning, SIGTERM to all", FINETUNE, [Fault("asked_to_stop", 0), Fault("asked_to_stop", 1)],
             "the same command continues", (TERM, TERM)),
]  # fmt: skip


def prepared(folder: Path) -> dict[str, str]:
    """The folders of images that scenarios name."""
    for name in ("fewer", "damaged", "rubbish"):
        shutil.copytree(PHOTOS, folder / name)
    photos = sorted(path.name for path in PHOTOS.glob("*.jpg"))
    (folder / "fewer" / photos[0]).unlink()
    for name, count in (("damaged", 1), ("rubbish", len(photos))):
        for photo in photos[:count]:  # of the same size, as a rank with a bad cable sees it
            path = folder / name / photo
            path.write_bytes(bytes(path.stat().st_size))
    return {name: str(folder / name) for name in ("fewer", "damaged", "rubbish")} | {
        "labelled": str(labelled(folder / "labelled", 8))
    }


def attempt(scenario: Scenario, folder: Path) -> str:
    """Try it in an empty folder; what is wrong, empty if all is as it must be."""
    places = prepared(folder)
    data = places["labelled"] if scenario.command.startswith("finetune") else str(PHOTOS)
    size = 6 if scenario.world == 3 else 4
    short = any(fault.what == "stopped" or fault.where == "evaluation" for fault in scenario.faults)
    command = (
        f"{scenario.command.format(**places)} --data {data} --out {folder / 'run'} --epochs 4 --batch-size {size // scenario.world} "
        f"--process-timeout {TIMEOUT if short else 10}"
    )
    each = [options.format(**places) for options in scenario.each] or None
    ended = together(folder, command.split(), scenario.world, scenario.faults, each)
    wrong = []
    if tuple(ended.codes) != scenario.codes:
        wrong.append(f"exit codes {ended.codes}, not {list(scenario.codes)}")
    for code, text in zip(ended.codes, ended.texts, strict=True):
        if code not in (KILLED, STOPPED, 0) and (scenario.said not in text or "Traceback" in text):
            wrong.append(f"{scenario.said!r} is not what was said:\n{text[-2000:]}")
    if scenario.continues:
        again = together(folder, command.split(), scenario.world)
        if set(again.codes) != {0}:
            wrong.append(f"the same command did not continue: {again.codes}\n{again.texts[0][-2000:]}")
        found = [step for step, _ in steps(folder / "run")]
        if found != list(range(1, len(found) + 1)):
            wrong.append(f"the log has the steps {found}")
    return "\n".join(wrong)


if __name__ == "__main__":  # for torchrun: as `leanmim`, but rank 1 is killed, once
    from leanmim.cli import main

    done = Path(sys.argv[1])
    if os.environ["RANK"] == "1" and not done.exists():
        done.touch()
        strike(Fault("killed", 1))
    main(sys.argv[2:])
