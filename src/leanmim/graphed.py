"""A step as a CUDA graph: the device repeats what it was told once, and nobody waits for the launches (ours, on torch's graphs).

A small model at low resolution has little to compute for each of a step's about two thousand kernels, and the host cannot tell
them as fast as the device does them. So the second step is recorded, and from then on repeated as a whole; the first one chooses
kernels. What differs from one step to the next lies in memory that the recording reads: images, learning rate, and the state of torch's
generator, from which masks and drop path are drawn. The kernels and their order are the same, and so are
the numbers, but for the learning rate, which is rounded to float32.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.step import update

Work = Callable[[], Tensor]


@runtime_checkable
class Recorder(Protocol):
    """What records."""

    def warm_up(self, work: Work) -> Tensor:
        """Do the work, where it will be recorded."""
        ...

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Write down what the work does on the device, without doing it.

        Returns:
            What does it, and the work's result, which is overwritten each time.

        Raises:
            UserError: it cannot be recorded.
        """
        ...

    def wait(self) -> None:
        """Until all that was told is done."""
        ...


class CudaGraphs:
    """Records with torch."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Work) -> Tensor:
        """See `Recorder`."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        gc.collect()  # what hides in cycles would be freed meanwhile
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # of this thread alone: another one pins the images that are read
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"this step cannot be recorded as a CUDA graph ({reason}); give --no-cuda-graph") from error
        return graph.replay, result

    def wait(self) -> None:
        """See `Recorder`."""
        torch.cuda.synchronize()


def updating(config: Pretrain) -> "GraphedUpdate | None":
    """A new one where a run asks for it; its ``auto`` is resolved."""
    return GraphedUpdate() if config.cuda_graph is True else None


@contextmanager
def reading(groups: list[dict[str, Any]], rate: Float[Tensor, ""]) -> Iterator[None]:
    """Context in which optimizers read the learning rate of these groups from the device."""
    before = [(group["lr"], group["capturable"]) for group in groups]
    for group in groups:
        group["lr"], group["capturable"] = rate, True
    try:
        yield
    finally:
        for group, (lr, capturable) in zip(groups, before, strict=True):
            group["lr"], group["capturable"] = lr, capturable


class GraphedUpdate:
    """`leanmim.step.update` of one batch, in one process, which is repeated once it has been recorded.

    Args:
        recorder: None is torch's.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or CudaGraphs()
        self.warm = False
        self.recording: tuple[Callable[[], None], Tensor] | None = None

    def forget(self) -> None:
        """Give the memory of a step back. The next step warms up, the one after is recorded anew."""
        if self.recording:
            self.recorder.wait()  # it may be under way
        self.warm, self.recording = False, None

    def __call__(
        self,
        losses: Callable[[Any], Iterator[Tensor]],
        optimizers: list[Optimizer],
        batches: Iterable[Tensor],
        accum: int = 1,
        clip_grad: float = 0.0,
        seeds: Sequence[int] = (),
        **options: Any,
    ) -> Float[Tensor, " s"]:
        """See `update`. All calls must be for the same model, optimizers and options, and as many images; all groups have one learning
        rate.

        Raises:
            UserError: the step cannot be recorded.
        """
        assert accum == 1
        (images,) = batches
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        (rate,) = {group["lr"] for group in groups}
        for group in groups:
            group["lr"] = rate = torch.tensor(rate).item()  # in every step as a recording reads it
        if seeds:
            torch.manual_seed(seeds[0])  # the recording goes on from where the generator is

        def work() -> Tensor:
            return update(losses, optimizers, [images], 1, clip_grad, **options)

        if not self.warm:
            self.warm = True
            return self.recorder.warm_up(work)
        if not self.recording:
            self.rate = torch.tensor(rate, device=images.device)
            self.images = images = images.clone()
            with reading(groups, self.rate):
                self.recording = self.recorder.record(work)
        repeat, found = self.recording
        assert images.shape == self.images.shape
        self.rate.fill_(rate)
        self.images.copy_(images)
        repeat()
        return found.clone()
