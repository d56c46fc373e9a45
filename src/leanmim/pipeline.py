"""Block-parallel training: the segments in several processes, as a pipeline without backward traffic (ours, for BIM).

No gradient crosses a segment's border. So a process that has run its segments on a batch sends their output to the next one and
goes to the next batch at once: segment i works on batch k while segment i + 1 works on batch k - 1. There is no bubble but the
filling and the draining, which a checkpoint, an evaluation, a change of phase and the end ask for. Each segment takes the same
steps on the same inputs as in one process, so the weights are the same, on a CPU bit for bit.

A message holds, of a batch, the images as they were read, the output of the sender's last segment, and, where segments draw
numbers as drop path does, the state of the generator after it. The receiver draws the same masks again, from the step's seed, and
computes the same target again. Bytes are about the
cheapest form of a target: at 224 px an image has 0.15 MB, pixels normalised in float32 have 0.6 MB; and only the first process
reads files.

In time step t process r works on batch t - r: the processes meet in each time step, in the sum of their losses.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.optim import Optimizer

from leanmim.device import to_device
from leanmim.errors import UserError
from leanmim.in_backward import trained_by
from leanmim.mim import MIM, Part
from leanmim.placed import Placed
from leanmim.processes import Process


def balanced(costs: Sequence[int], count: int) -> list[range]:
    """Consecutive segments in so many parts that the most expensive part costs as little as possible.

    Args:
        costs: of each segment, at least 0.
        count: of parts.

    Raises:
        UserError: there are fewer segments than parts.
    """
    if count > len(costs):
        raise UserError(
            f"--pipeline: {len(costs)} segments cannot be shared among {count} processes; start {len(costs)} at most, or cut the model "
            "into more --segments"
        )
    before = [0, *accumulate(costs)]

    @cache
    def best(start: int, parts: int) -> tuple[int, tuple[int, ...]]:
        """Of the segments from ``start`` on: what the most expensive part costs, and where the parts begin."""
        if parts == 1:
            return before[-1] - before[start], (start,)
        return min(
            (max(before[stop] - before[start], rest), (start, *cuts))
            for stop in range(start + 1, len(costs) - parts + 2)
            for rest, cuts in [best(stop, parts - 1)]
        )

    return [range(*borders) for borders in pairwise((*best(0, count)[1], len(costs)))]


def speed_up(costs: Sequence[int], count: int) -> float:
    """How many times as fast as one process so many are at most: all costs by those of the most expensive part."""
    return sum(costs) / max(sum(costs[i] for i in part) for part in balanced(costs, count))


class Layout(NamedTuple):
    """How a tensor lies in memory: channels last stays channels last on the way."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        """That of a tensor without gaps."""
        return cls(tuple(x.shape), x.stride(), x.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """A tensor of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def flat(x: Tensor) -> Tensor:
    """The values of a tensor without gaps, in the order in which they lie in memory."""
    return x.as_strided((x.numel(),), (1,))


class Message(NamedTuple):
    """What the process before sends of a batch, on its way here."""

    parts: list[Tensor]
    """Images, output of the sender's last segment, and perhaps the state of the generator after it."""
    transfers: list[Any]


class Pipeline(Placed):
    """The segments of this process, and what it has to do with the others.

    Args:
        model: the same in all processes.
        optimizers: one for each segment.
        device: where this process trains.
        process: this one among all.
        parts: the segments of each process; see `balanced`.
        accum: batches of a step.
    """

    def __init__(
        self,
        model: MIM,
        optimizers: list[Optimizer],
        device: torch.device,
        process: Process,
        parts: Sequence[range],
        accum: int,
    ) -> None:
        self.model, self.optimizers, self.device, self.process = model.to(device), optimizers, device, process
        self.parts, self.accum = parts, accum
        self.last = process.rank == process.world - 1
        self.trained = [trained_by(optimizer) for optimizer in optimizers]
        self.layouts = [[Layout.of(p) for p in own] for own in self.trained]
        self.settled = True  # all weights, and in the first process all optimizer state
        self.done: int = 0
        self.begun: int = 0  # steps: of this process, of the one that is furthest
        self.known: dict[int, Tensor] = {}  # own losses, by the step
        self.incoming: list[Layout] = []  # of a message here, once the first one has come
        self.outgoing: list[Layout] = []
        self.coming: list[Message] = []
        self.sent: deque[tuple[list[Any], list[Tensor]]] = deque()

    @property
    def own(self) -> range:
        """The segments of this process."""
        return self.parts[self.process.rank]

    def step(
        self, step: int, meets: Callable[[int], bool], work: Callable[[int], Float[Tensor, " s"]]
    ) -> Float[Tensor, " n"]:
        """The losses of all segments in a step that all processes have done; this one goes ahead meanwhile, as far as the
        processes after it are behind.

        Args:
            step: of the run.
            meets: whether nobody may go ahead of so many steps, for then the weights of all are looked at.
            work: does this process's share of a step and returns its losses.
        """
        rank, world = self.process
        self.begun = next((done for done in range(step + 1, step + world) if meets(done)), step + world)
        self.done = max(self.done, step)
        if self.settled:
            self.drop()
        while self.done < min(step + world - rank, self.begun):
            self.known[self.done] = work(self.done)
            self.done += 1
        losses = torch.zeros(len(self.optimizers), device=self.device)
        losses[self.own.start : self.own.stop] = self.known.pop(step)
        dist.all_reduce(losses)
        return losses

    def batches(self, feed: Iterator[Tensor]) -> Iterator[Real[Tensor, "b c H W"]]:
        """The images of a step: those that were read, or those that the process before has sent."""
        if self.process.first:
            for images in islice(feed, self.accum):
                self.images = to_device(images, self.device)
                yield self.images
            return
        arriving = self.coming or self.expect()
        # What the process before works on now is on its way while this one works.
        self.coming = self.expect() if self.done + 1 < self.begun else []
        for message in arriving:
            for transfer in message.transfers:
                transfer.wait()
            self.images, self.x, *self.states = message.parts
            yield self.images

    def expect(self) -> list[Message]:
        """The messages of the next step, on their way."""
        source = self.process.rank - 1
        if not self.incoming:
            dist.recv_object_list(found := [self.incoming], source)
            self.incoming = found[0]
        arriving = []
        for _ in range(self.accum):
            parts = [layout.empty(self.device) for layout in self.incoming]
            arriving.append(Message(parts, [dist.irecv(flat(part), source) for part in parts]))
        return arriving

    def losses(self, images: Float[Tensor, "b c H W"]) -> Iterator[Float[Tensor, ""]]:
        """Those of this process's segments, as `MIM.losses`."""
        return self.model.losses(images, part=Part(self.own, self.enter, self.leave))

    @property
    def generator(self) -> torch.Generator:
        """torch's global one of this device."""
        cuda = self.device.type == "cuda"
        return torch.cuda.default_generators[self.device.index] if cuda else torch.default_generator

    def enter(self, images: Tensor) -> Tensor:
        """What the first segment of this process runs on."""
        if not self.process.first:
            images = self.x
            for state in self.states:  # a GPU's is a few bytes, for which the host waits
                self.generator.set_state(state.cpu())
        self.before = self.generator.get_state()
        return images

    def leave(self, x: Tensor) -> None:
        """Send the output of this process's last segment; its backward pass runs meanwhile."""
        if self.last:
            return
        x = torch.empty_like(x).copy_(x)  # without gaps
        state, target = self.generator.get_state(), self.process.rank + 1
        if not self.outgoing:
            self.draws = len(self.incoming) == 3 or not torch.equal(state, self.before)
        message = [self.images, x, *([state.to(self.device)] if self.draws else [])]
        if not self.outgoing:
            self.outgoing = [Layout.of(part) for part in message]
            dist.send_object_list([self.outgoing], target)
        if len(self.sent) == self.accum:
            for transfer in self.sent.popleft()[0]:  # of the step before: the next process works on it now
                transfer.wait()
        self.sent.append(([dist.isend(flat(part), target) for part in message], message))

    def loaded(self, i: int) -> None:
        """As after `settle`: the first process keeps the state of all segments, that of the others' on the host."""
        if i in self.own:
            return
        if not self.process.first:
            self.optimizers[i].state.clear()
        for state in self.optimizers[i].state.values():
            for name, value in state.items():
                state[name] = value.cpu()

    def drop(self) -> None:
        """Free the weights and optimizer state of the other processes' segments."""
        for i, parameters in enumerate(self.trained):
            if i not in self.own:
                self.optimizers[i].state.clear()
                for parameter in parameters:
                    parameter.data = parameter.data.new_empty(0)
        self.settled = False

    def settle(self) -> None:
        """Give all weights to every process, and all optimizer state to the first one. All processes must call it."""
        if self.settled:
            return
        for rank, part in enumerate(self.parts):
            for i in part:
                for parameter, layout in zip(self.trained[i], self.layouts[i], strict=True):
                    if i not in self.own:
                        parameter.data = layout.empty(self.device)
                    dist.broadcast(flat(parameter.data), rank)
                for module in (part for part in self.model.parts(i) if isinstance(part, nn.Module)):
                    for buffer in module.buffers():
                        dist.broadcast(flat(buffer), rank)
        self.gather_state()
        self.settled = True

    def gather_state(self) -> None:
        """Send the optimizers' state to the first process, which keeps it on the host."""
        own = [
            (i, k, name, Layout.of(value))
            for i in self.own
            for k, parameter in enumerate(self.trained[i])
            for name, value in self.optimizers[i].state.get(parameter, {}).items()
        ]
        for rank, entries in enumerate(self.process.gather(own)):
            for i, k, name, layout in entries if rank else []:
                state = self.optimizers[i].state
                parameter = self.trained[i][k]
                if rank == self.process.rank:
                    dist.send(flat(state[parameter][name].to(self.device)), 0)
                elif self.process.first:
                    dist.recv(flat(value := layout.empty(self.device)), rank)
                    state[parameter] = {**state.get(parameter, {}), name: value.cpu()}

    @contextmanager
    def whole(self) -> Iterator[MIM]:
        """Context in which all weights are here. All processes must enter it, unless they have settled."""
        self.settle()
        yield self.model
