"""This process among those that torchrun started."""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from leanmim.device import resolve_device
from leanmim.errors import UserError

START = timedelta(minutes=30)  # for all processes to be there; torch's own default
SILENT = 3  # beats without which a process is looked at as gone, once torch.distributed has failed
CONTINUES = "the same command continues from the last checkpoint, if one was written"


class Process(NamedTuple):
    """Which one of how many."""

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    @property
    def replica(self) -> "Process":
        """This process among those that have a part of each step's images; in a pipeline all have the same images."""
        return self

    def wait(self) -> None:
        """Wait until all processes are here, however long one of them evaluates or reads.

        Raises:
            UserError: one of them ended, or is stopped.
        """
        if self.world > 1:
            Peers.joined.meet()

    def mean(self, values: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        """The mean over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def most(self, values: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        """The largest over all processes."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def broadcast(self, values: Sequence[Tensor]) -> None:
        """Give them the first process's numbers."""
        if self.world > 1:
            for value in values:
                dist.broadcast(value, 0)

    def concatenate(self, rows: list[Tensor], device: torch.device) -> Float[Tensor, "n d"]:
        """The rows of all processes, in their order, from parts of b rows of d numbers; one of them at least has some."""
        own = torch.cat(rows) if rows else torch.empty(0, 0)
        if self.world == 1:
            return own
        shapes = self.gather(tuple(own.shape))
        padded = torch.zeros(*map(max, zip(*shapes, strict=True)), device=device)
        if rows:
            padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(found, padded)
        return torch.cat([part[:count] for part, (count, _) in zip(found, shapes, strict=True)])

    def gather(self, value: Any) -> list[Any]:
        """The objects of all processes."""
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found


ALONE = Process(0, 1)


class InPipeline(Process):
    """One of several processes that share a model and have the same images: see `leanmim.pipeline`."""

    @property
    def replica(self) -> Process:
        """As in one process."""
        return ALONE

    def mean(self, values: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        """All have the same already."""
        return values


class Peers:
    """What the processes know of each other: each counts on in a store that all share, and one that does not is stopped or
    gone. torch's own time-out does not say which one, and would end those that wait for a long evaluation.

    Args:
        process: this one among all.
        store: shared by all.
        minutes: after which a process that does not count on ends the others.
        exits: end this process then, also from within a collective operation, which NCCL never leaves.
    """

    joined: ClassVar["Peers"]
    """Of the process group at hand; torch has one, too."""

    def __init__(self, process: Process, store: dist.Store, minutes: float, exits: bool = False) -> None:
        self.process, self.store, self.minutes, self.exits = process, store, minutes, exits
        self.others = [rank for rank in range(process.world) if rank != process.rank]
        self.pause = min(1.0, 6 * minutes)  # seconds between two beats: at most a tenth of the limit
        # Silence is measured in own beats: where all processes are stopped together (Ctrl-Z), none of them is silent.
        self.counts, self.silence = [0] * process.world, [0] * process.world
        self.meetings = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.count, daemon=True)
        self.thread.start()

    def count(self) -> None:
        """Count on, and watch the others, until the end."""
        with contextlib.suppress(dist.DistError):  # the store is gone: whoever works or waits will notice
            while not self.over.wait(self.pause):
                self.store.add(f"beats {self.process.rank}", 1)
                for rank in self.others:
                    count = self.store.add(f"beats {rank}", 0)
                    self.silence[rank] = self.silence[rank] + 1 if count == self.counts[rank] else 0
                    self.counts[rank] = count
                if self.exits and (lost := self.lost()):
                    print(f"leanmim: {lost}; {CONTINUES}", file=sys.stderr, flush=True)
                    os._exit(2)

    def rest(self) -> None:
        """Count no longer."""
        self.over.set()
        self.thread.join(2 * self.pause)  # not for ever: who keeps the store may be stopped

    @property
    def first_silent(self) -> int:
        """The process that has been silent for longest; others may have ended because of it."""
        return max(self.others, key=self.silence.__getitem__)

    def name(self, rank: int) -> str:
        """Of a process, for people to read."""
        return f"rank {rank} of {self.process.world} processes"

    def lost(self) -> str:
        """Which process is silent for too long, for people to read; empty if none is."""
        if self.silence[self.first_silent] * self.pause > 60 * self.minutes:
            return f"{self.name(self.first_silent)} has not answered for {self.minutes:g} minutes (--process-timeout)"
        return ""

    def tell(self, reason: str) -> None:
        """Let the others know why this process ends."""
        self.store.set(f"end of {self.process.rank}", reason)

    def told(self) -> str:
        """What a process that ended has told, for people to read; empty if none has."""
        for rank in self.others:
            if self.store.check([f"end of {rank}"]):
                return f"{self.name(rank)} has ended: {self.store.get(f'end of {rank}').decode()}"
        return ""

    def meet(self) -> None:
        """Wait until all processes are here; they need not take part in anything meanwhile, but live.

        Raises:
            UserError: one of them ended, or is silent for too long.
        """
        self.meetings += 1
        self.store.add("met", 1)
        while self.store.add("met", 0) < self.meetings * self.process.world:
            if lost := self.told() or self.lost():
                raise UserError(f"{lost}; {CONTINUES}")
            time.sleep(0.02)

    def cause(self) -> str:
        """Why torch.distributed failed, for people to read."""
        try:
            for _ in range(SILENT + 2):
                if known := self.told() or self.lost():
                    return known
                time.sleep(self.pause)
        except dist.DistError:
            return "the process that brought the others together (torchrun, or rank 0) is gone"
        if self.silence[self.first_silent] >= SILENT:
            return f"{self.name(self.first_silent)} does not answer: it was killed, stopped or cut off"
        return (
            f"the {self.process.world} processes did not meet within {self.minutes:g} minutes, though all of them answer; if one "
            "is that much slower than the others, raise --process-timeout"
        )


@contextlib.contextmanager
def processes(device: str, minutes: float) -> Iterator[tuple[Process, torch.device]]:
    """Join the other processes, if torchrun started any, and leave them at the end.

    Args:
        device: as configured.
        minutes: after which a process that does not answer ends the others.

    Raises:
        UserError: another process ended or does not answer, or the memory was not enough.
    """
    rank, world, local = (
        int(os.environ.get(key, value)) for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    place, process = resolve_device(device, local), Process(rank, world)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    with among(process, place, minutes) if world > 1 else contextlib.nullcontext(), enough_memory(place):
        yield process, place


groups = itertools.count()  # of this process, one after the other


@contextlib.contextmanager
def among(process: Process, place: torch.device, minutes: float) -> Iterator[None]:
    """In a process group. An error of torch.distributed becomes a `UserError` that says which process is gone."""
    nccl = place.type == "cuda"
    limit = timedelta(minutes=2 * minutes if nccl else minutes)  # NCCL's own end is a trace of C++: ours comes before
    try:
        store = common_store(*process)
        dist.init_process_group(
            "nccl" if nccl else "gloo", store=store, rank=process.rank, world_size=process.world, timeout=limit
        )
    except (ValueError, RuntimeError) as error:  # dist.DistError is one, and gloo's are plain ones
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {process.rank} of {process.world} processes (RANK, WORLD_SIZE) cannot meet the others at {address} (MASTER_ADDR, "
            f"MASTER_PORT): {reason}; start them with torchrun, or unset WORLD_SIZE to train in one process"
        ) from error
    peers = Peers.joined = Peers(process, dist.PrefixStore("peers", store), minutes, exits=nccl)
    try:
        yield
        peers.rest()
        dist.barrier()  # the one that keeps the store is not to leave first
    except BaseException as error:
        if of_distributed(error):
            raise UserError(f"{peers.cause()}; {CONTINUES}") from error
        with contextlib.suppress(dist.DistError):
            peers.tell(str(error) or type(error).__name__)
        raise
    finally:
        peers.rest()
        dist.destroy_process_group()


def common_store(rank: int, world: int) -> dist.Store:
    """Where the processes leave word for each other, once all are there."""
    store: dist.Store
    store, _, _ = next(dist.rendezvous("env://", timeout=START))
    # torchrun's store outlives a restart: with the same keys the addresses of dead processes would be found in it
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"leanmim {restart} {next(groups)}", store)
    store.set(f"here {rank}", "")
    store.wait([f"here {other}" for other in range(world)], START)
    return store


def of_distributed(error: BaseException) -> bool:
    """Whether torch.distributed raised it; what gloo raises is a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


@contextlib.contextmanager
def enough_memory(place: torch.device) -> Iterator[None]:
    """Raise UserError where the memory was not enough after all."""
    try:
        yield
    except Exception as error:
        # the allocators of the CPU and of MPS raise a plain RuntimeError
        signs = ("DefaultCPUAllocator", "out of memory") if type(error) is RuntimeError else ()
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            sign in str(error) for sign in signs
        ):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"out of memory on {place} ({reason}): close what else uses it, and {CONTINUES}; or start afresh in another --out "
            "with a smaller --batch-size and a larger --accum"
        ) from error
