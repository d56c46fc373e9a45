"""The batches of a run, from any source, read ahead by workers.

b batch, c channels, H W pixels.
"""

import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from jaxtyping import Real
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from leanmim.config import Pretrain
from leanmim.data.crops import Crops
from leanmim.data.order import order_of_steps
from leanmim.data.read import Bad
from leanmim.data.source import REMEDY, Away, Source
from leanmim.device import cores_of_a_process, cpus
from leanmim.errors import UserError
from leanmim.processes import ALONE, Process
from leanmim.signals import SIGNALS

CPU = torch.device("cpu")
SOCKET = 103  # bytes of a socket's path, on macOS; four more on Linux
PREFETCH = 4  # batches that each reader is ahead


def effective_batch(config: Pretrain, world: int = 1) -> int:
    """Images of a step, over all processes; the batch size is a number."""
    return int(config.batch_size) * config.accum * world


def batches(
    config: Pretrain,
    source: Source,
    start: int,
    stop: int,
    process: Process = ALONE,
    device: torch.device = CPU,
    per_epoch: int | None = None,
) -> Iterator[tuple[Real[Tensor, "b c H W"], list[Bad]]]:
    """The random crops of steps ``start`` to ``stop``, ``config.accum`` batches for each, and the images that could not be
    read.

    The order is that of a run of this configuration alone, and draws nothing from torch's global generator.

    Args:
        config: input size, crops, batch, accumulation, workers, seed, patience.
        source: the images.
        start: steps that came before.
        stop: the step after the last one.
        process: which part of each step's images is asked for.
        device: where the batches will go; for a GPU they wait in pinned memory.
        per_epoch: steps; None is as many as there are images for.
    """
    dataset = Crops(
        source, config.size, config.crop_scale, config.crop_ratio, config.flip, config.seed, config.interpolation,
        config.decode,
    )  # fmt: skip
    per_epoch = per_epoch or len(source) // effective_batch(config, process.world)
    order = order_of_steps(config, len(source), per_epoch, start, stop, process)
    return loader(dataset, order, resolve_workers(config.workers), device, collate, config.data_patience)


def collate(items: list[tuple[Tensor, list[Bad]]]) -> tuple[Real[Tensor, "b c H W"], list[Bad]]:
    """Stack the images, gather the reports."""
    return torch.stack([image for image, _ in items]), [bad for _, bads in items for bad in bads]


def resolve_workers(workers: int) -> int:
    """-1 is this process's share of the CPU's cores less one; of more than 16, half.

    Raises:
        UserError: they are more than any machine has a use for.
    """
    cores = cpus()
    if workers > (most := max(32, min(1024, 16 * cores))):
        raise UserError(f"--workers {workers} is too many for {cores} CPU cores; give {most} at most, or -1")
    own = cores_of_a_process()
    return min(own - 1, max(8, own // 2)) if workers < 0 else workers


def loader(
    dataset: Dataset, order: Any, workers: int, device: torch.device, collate_fn: Callable, patience: float = 0.0
) -> Iterator[Any]:
    """The batches of ``order``, read ahead; workers use one thread each.

    Args:
        dataset: the images.
        order: the items of each batch; with ``patience`` it can be iterated over again.
        workers: processes that read; 0 reads in this one.
        device: where the batches will go; for a GPU they wait in pinned memory.
        collate_fn: from the items of a batch to the batch.
        patience: minutes to wait for images that are away (`Away`); afterwards the reading goes on where it was.

    Raises:
        UserError: the images stay away, a reader was killed, or what the dataset says.
    """
    done, since = 0, math.inf
    while True:
        try:
            for batch in read_ahead(dataset, islice(order, done, None), workers, device, collate_fn):
                yield batch
                done, since = done + 1, math.inf
            return
        except Away as error:
            now, away = time.monotonic(), str(error)
        # The error is gone, and with it the readers: nothing is held open on a drive that is to be mounted again.
        if since == math.inf:
            since = now
            if patience:
                what = away.removesuffix(REMEDY)
                print(f"leanmim: {what}; waiting up to {patience:g} minutes (--data-patience)", file=sys.stderr)
        left = 60 * patience - (now - since)
        if left <= 0:
            raise UserError(away)
        time.sleep(min(left, 60, max(1, now - since)))


def read_ahead(
    dataset: Dataset, order: Iterable[Any], workers: int, device: torch.device, collate_fn: Callable
) -> Iterator[Any]:
    """`loader`, as long as the images are there."""
    batches = DataLoader(
        dataset,
        batch_sampler=order,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=HandOver(collate_fn, room_for_a_batch(workers)) if workers else collate_fn,
        pin_memory=device.type == "cuda",
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=outlast_the_first_signal,
        # Workers draw nothing from this: it only keeps the loader from advancing torch's global generator.
        generator=torch.Generator(),
    )
    try:
        for batch in quietly(batches):
            yield tensors(batch) if isinstance(batch, Piped) else batch
    except UserError as error:
        # From a worker the message comes wrapped in a traceback. Ours would keep the workers alive: it is dropped.
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from error.with_traceback(None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that reads images ended ({str(error).strip()}); where memory ran out, fewer --workers or a smaller "
            "--batch-size need less; then give the same command again"
        ) from error.with_traceback(None)


def quietly(batches: DataLoader) -> Iterator[Any]:
    """The batches. torch would raise the death of a reader wherever this process is; so who asks for a batch is told it."""
    main = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main else None
    feed = iter(batches)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    # should this process exit while something still holds the readers, as an error's traceback does
    at_exit = Finalize(None, end_readers, exitpriority=0)
    try:
        yield from feed
    finally:
        at_exit.cancel()


def end_readers() -> None:
    """Kill the readers. multiprocessing would send them one SIGTERM at the exit, which they outlast, and wait for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def outlast_the_first_signal(_: int) -> None:
    """In a reader: a signal to stop that goes to the whole group, as Ctrl-C and systemd send it, is for the training to heed,
    which finishes the step first and then ends its readers.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def room_for_a_batch(workers: int) -> int:
    """Bytes that a batch may take in shared memory, with all those that are read ahead; a container may have little."""
    if no_room_for_sockets():
        return 0
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # a system without, as macOS
        return sys.maxsize
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(0.9 * free) // (processes * (PREFETCH * workers + 2))


def no_room_for_sockets() -> bool:
    """Whether the folder for temporary files has too long a path: torch hands shared memory over by sockets in it, whose paths
    the system keeps short. A reader that cannot would only print an error, and the training wait for ever.
    """
    return len(os.fsencode(tempfile.gettempdir())) > SOCKET - len("/pymp-12345678/listener-12345678")


class Piped(list):
    """A batch whose tensors are arrays: those are sent through a pipe, tensors through shared memory."""


class HandOver:
    """Collates in a reader, and chooses how the batch gets to the training.

    Args:
        collate_fn: from the items of a batch to a tuple or list, of tensors among others.
        room: bytes that a batch may take in shared memory.
    """

    def __init__(self, collate_fn: Callable, room: int) -> None:
        self.collate_fn, self.room = collate_fn, room

    def __call__(self, items: list[Any]) -> Any:
        """The batch."""
        batch = self.collate_fn(items)
        if sum(part.nbytes for part in batch if isinstance(part, Tensor)) <= self.room:
            return batch
        return Piped(part.numpy() if isinstance(part, Tensor) else part for part in batch)


def tensors(batch: Piped) -> list[Any]:
    """A batch that came through a pipe."""
    why = (
        "the path of the folder for temporary files is too long for shared memory, give a shorter one (TMPDIR)"
        if no_room_for_sockets()
        else "shared memory (/dev/shm) is too small for the batches that are read ahead, give it more (docker run --shm-size 8g) or "
        "take fewer --workers"
    )
    say_once(f"leanmim: batches come through pipes, which is slower: {why}")
    return [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in batch]


@cache
def say_once(text: str) -> None:
    """A line on the standard error, the first time."""
    print(text, file=sys.stderr)
