"""The processes of a comparison: several side by side, each with a task of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Protocol

import torch

from leanmim.config import Compare
from leanmim.device import cpus
from leanmim.progress import console_of, duration, progress_bar

POLL = 0.1  # s


@dataclass(frozen=True)
class Task:
    """What a process does: ``python -m leanmim.comparison.worker WHAT FOLDER``."""

    what: str
    name: str
    """For people to read."""
    folder: Path
    """What it has to know is there, and it leaves its result there."""
    seconds: float = 0.0
    """That it takes at least, as far as that is known."""

    @property
    def log(self) -> Path:
        """What the process says."""
        return self.folder / "log.txt"


class Running(Protocol):
    """A process that was started."""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""

    def wait(self) -> int:
        """Until it has ended."""


class Worker(subprocess.Popen):
    """A process that ends, with a checkpoint, when this one does, however that ends.

    It watches its standard input, whose other end is here. It is in a session of its own, so that Ctrl-C reaches it by this process
    only, and once: a second signal would end it without a checkpoint.
    """

    def __init__(self, task: Task, place: dict[str, str]) -> None:
        task.folder.mkdir(parents=True, exist_ok=True)
        with open(task.log, "ab") as log:
            super().__init__(
                [sys.executable, "-m", "leanmim.comparison.worker", task.what, str(task.folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=os.environ | place, start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        assert self.stdin is not None
        self.stdin.close()


launch: Callable[[Task, dict[str, str]], Running] = Worker


def places_of(config: Compare, device: torch.device) -> list[dict[str, str]]:
    """For each of the processes side by side the environment that gives it its part of the machine.

    On GPUs that is one of them each, in turn. On a CPU it is an equal part of the cores; waiting threads do not spin. More of them
    than there are recipes to train, of all seeds, would wait for the last ones.
    """
    cores, trainings = cpus(), config.seeds * len(config.recipes)
    if device.type != "cuda":
        auto = min(cores, trainings) if device.type == "cpu" else 1
        jobs = auto if config.jobs == "auto" else int(config.jobs)
        threads = max(1, cores // jobs)
        return [{"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    jobs = min(len(devices), trainings) if config.jobs == "auto" else int(config.jobs)
    threads = max(1, cores // jobs)
    return [
        {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)], "OMP_NUM_THREADS": str(threads)}
        for number in range(jobs)
    ]


def run_tasks(
    tasks: Sequence[Task],
    places: Sequence[dict[str, str]],
    title: str,
    done: Callable[[Task], str] = lambda task: "",
) -> list[Task]:
    """Do the tasks in their order, as many side by side as there are places.

    Args:
        tasks: to do.
        places: environments, one for each process at a time.
        title: of the progress bar.
        done: called after each that succeeded; what it returns is told.

    Returns:
        Those that failed. The others are done all the same.
    """
    waiting, free, failed = list(tasks), list(places), list[Task]()
    running: dict[Task, tuple[Running, dict[str, str], float]] = {}
    took: dict[Task, float] = {}
    console = console_of(stderr=True)
    progress = progress_bar(console, transient=True)
    bar = progress.add_task(title, total=len(tasks), text="")
    try:
        with progress:
            while waiting or running:
                while waiting and free:
                    task, place = waiting.pop(0), free.pop(0)
                    running[task] = (launch(task, place), place, time.perf_counter())
                    progress.update(bar, text=", ".join(task.name for task in running))
                time.sleep(POLL)
                for task in [task for task, (process, *_) in running.items() if process.poll() is not None]:
                    process, place, began = running.pop(task)
                    free.append(place)
                    if code := process.wait():
                        if code < 0:  # by a signal: it could say nothing itself
                            with open(task.log, "a") as log:
                                log.write(f"\nleanmim: {killed(-code)}\n")
                        failed.append(task)
                        console.print(failure(task))
                    else:
                        took[task] = time.perf_counter() - began
                        left = time_left(took, [*waiting, *running], len(places))
                        if said := done(task):
                            console.print(
                                f"{task.name}: {said}; {len(tasks) - len(waiting) - len(running)} of {len(tasks)}{left}"
                            )
                    progress.update(bar, completed=len(tasks) - len(waiting) - len(running))
    except BaseException:
        for process, *_ in running.values():
            process.stop()
        for process, *_ in running.values():
            process.wait()
        raise
    return failed


def time_left(took: dict[Task, float], left: Sequence[Task], side_by_side: int) -> str:
    """What the tasks that are left will take: each as long as those so far that were predicted to take as long, or what is
    predicted of it and what the others took beyond that.
    """
    if not left:
        return ""
    beyond = mean(max(0.0, seconds - task.seconds) for task, seconds in took.items())
    alike = {
        task.seconds: mean(seconds for other, seconds in took.items() if other.seconds == task.seconds) for task in took
    }
    seconds = sum(alike.get(task.seconds, task.seconds + beyond) for task in left)
    return f", about {duration(seconds / side_by_side)} left"


def killed(number: int) -> str:
    """What is told of a process that a signal ended."""
    name = signal.Signals(number).name
    hint = ", as is what takes more memory than there is; try fewer --jobs" if number == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def failure(task: Task) -> str:
    """What is told of a task that failed: its last words and its log."""
    return f"{task.name} failed ({last_words(task)}); its log is {task.log}"


def last_words(task: Task) -> str:
    """The last line of a task's log."""
    lines = task.log.read_text(errors="replace").splitlines()
    return next((line.strip().removeprefix("leanmim: ") for line in reversed(lines) if line.strip()), "it said nothing")
