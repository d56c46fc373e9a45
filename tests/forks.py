"""Commands in processes of their own that begin at once: they are forked from a server that has imported leanmim already."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import matplotlib
import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["leanmim.train.pretrain", "leanmim.classifier.finetune", "tests.forks"])


def run(
    words: list[str],
    output: str,
    environment: dict[str, str],
    first: Callable[[], None] | None,
    session: bool,
) -> None:
    """In the process: the command."""
    if session:
        os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of readers; here the server's own would be it
    torch.set_num_threads(1)
    matplotlib.rcParams["savefig.dpi"] = 20  # as in conftest
    if first:
        first()
    from leanmim.cli import main

    main(words)


def launch(
    words: list[str],
    output: Path,
    environment: dict[str, str] | None = None,
    first: Callable[[], None] | None = None,
    session: bool = False,
) -> ForkServerProcess:
    """Begin a command.

    Args:
        words: what follows ``leanmim``.
        output: a file for all that it prints.
        environment: what it has beside the server's variables.
        first: called in the process before the command; it must pickle.
        session: whether the process leads a session and process group of its own.
    """
    process = FORKS.Process(target=run, args=(words, str(output), environment or {}, first, session))
    process.start()
    return process


def finish(words: list[str], output: Path) -> str:
    """Run a command to its end, which must be good; what it printed."""
    process = launch(words, output)
    process.join(300)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def until(process: ForkServerProcess, ready: Callable[[], bool], limit: float = 120) -> None:
    """Wait until something is so; fail if the process ends first."""
    deadline = time.monotonic() + limit
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
