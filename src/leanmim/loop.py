"""The one resumable loop: clock, progress, log, TensorBoard, checkpoints, signals, agreement among processes.

It never knows what a step is.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from leanmim.config import Logging
from leanmim.device import peak_memory
from leanmim.errors import UserError
from leanmim.processes import Process
from leanmim.progress import progress_bar, time_left
from leanmim.run import Run

T = TypeVar("T")
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asked to stop; the step was finished and a checkpoint written."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint")
        self.number = number


class Loop:
    """Steps from the last checkpoint on.

        with Loop(...) as loop:
            for step in loop.until(steps):
                losses = ...
                loop.record(losses, images=..., epoch=..., lr=...)
                if loop.checkpoint_due:
                    loop.save(state)

    Processes log together, and so they agree on when: their clocks differ. A first signal (Ctrl-C, SIGTERM, SIGHUP)
    asks for a checkpoint of the step at hand and then raises `Stopped`; several processes finish the line of the log first. A
    second one ends at once.

    Args:
        run: where the log and the checkpoints go; the first process writes them.
        config: how often.
        steps: of the whole run.
        state: the checkpoint to continue from, if any.
        process: this one among all.
        device: whose memory is logged.
        title: of the progress bar.
        console: where lines and the bar go; None is the standard output, of the first process only.
    """

    def __init__(
        self,
        run: Run,
        config: Logging,
        steps: int,
        state: dict[str, Any] | None,
        process: Process,
        device: torch.device,
        title: str,
        console: Console | None = None,
    ) -> None:
        self.run, self.config, self.steps, self.process, self.device = run, config, steps, process, device
        self.start = self.done = self.logged = state["step"] if state else 0
        self.losses: list[Tensor] = []  # since the last line, for each step those of all segments
        if state and "losses" in state:
            self.losses = [losses.to(device) for losses in state["losses"]]
        self.logged -= len(self.losses)
        self.console = console or Console(quiet=not process.first, highlight=False, soft_wrap=True, markup=False)
        self.progress = progress_bar(self.console, transient=False, disable=not process.first or self.done == steps)
        self.text = ""  # of the bar, as of the last line
        self.task = self.progress.add_task(title, total=steps, completed=self.start, text="")
        self.signal = 0  # the first one that came here
        self.stop = 0  # the one that all processes know of
        self.written = -1  # step of the newest checkpoint
        self.waited, self.images, self.fresh = 0.0, 0, True
        self.spent, self.trained = 0.0, 0  # seconds and images of all lines of this call

    def __enter__(self) -> "Loop":
        """Open the log, listen to signals."""
        if self.process.first:
            self.file = open(self.run.metrics, "a", buffering=1)
            self.board = SummaryWriter(self.run.folder / "tensorboard", purge_step=self.start)
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores some
            self.handlers = {number: signal.signal(number, self.heard) for number in heeded}
        self.progress.start()
        self.began = self.since = self.saved = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the log, listen no longer."""
        self.progress.stop()
        self.unlisten()
        if self.process.first:
            self.file.close()
            self.board.close()

    def heard(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal; from then on they do what they did before."""
        self.signal = number
        self.unlisten()

    def unlisten(self) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def until(self, stop: int) -> Iterator[int]:
        """The steps that are left up to ``stop``.

        Raises:
            Stopped: a signal came, and the checkpoint it asked for is written.
        """
        for step in range(self.done, stop):
            yield step
            if self.stop and self.written == self.done:
                raise Stopped(self.stop, self.done)

    def timed(self, feed: Iterator[T]) -> Iterator[T]:
        """The same items; waiting for them is counted."""
        while True:
            before = time.perf_counter()
            try:
                item = next(feed)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield item

    def record(self, losses: Float[Tensor, " s"], *, images: int, epoch: float, lr: float, line: bool = False) -> None:
        """The step at hand is done; from time to time write a line.

        Args:
            losses: one for each segment, on the device.
            images: of this step, over all processes.
            epoch: epochs done, a fraction.
            lr: learning rate of this step.
            line: write a line now, whatever --log-every says.

        Raises:
            UserError: a loss is not finite.
        """
        self.done += 1
        self.move()
        self.losses.append(losses)
        self.images += images
        every = self.config.log_every
        if self.process.world == 1:
            self.stop = self.signal
        self.fresh = line or self.done % every == 0 or self.done == self.steps or not self.config.checkpoint_minutes
        if not self.fresh and not self.stop:
            return
        values = self.process.mean(torch.stack(self.losses).mean(0)).tolist()
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"the loss is {values} at step {self.done}: training diverged; lower --blr, set --clip-grad, or use "
                "--precision fp32. The last checkpoint is from before and stays"
            )
        if not self.fresh:  # between two lines a signal asks for a checkpoint
            return
        seconds = time.perf_counter() - self.since
        found = {
            "epoch": epoch,
            "loss": sum(values) / len(values),
            "lr": lr,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
            "memory_bytes": peak_memory(self.device),
            "seconds": seconds,
        }
        if len(values) > 1:
            found |= {f"loss_{i}": value for i, value in enumerate(values)}
        self.write(**found)
        self.tell(found)
        self.spent, self.trained = self.spent + seconds, self.trained + self.images
        self.losses, self.waited, self.images, self.logged = [], 0.0, 0, self.done
        self.since = time.perf_counter()
        self.stop = max(self.process.gather(self.signal))

    @property
    def time_left(self) -> str:
        """Time that is left at the mean speed of this call, or that it took; evaluations are part of it."""
        return time_left(time.perf_counter() - self.began, self.done - self.start, self.steps - self.done)

    def move(self) -> None:
        """Move the bar to the step at hand; nothing is asked of the device."""
        self.progress.update(self.task, completed=self.done, text=f"{self.time_left} {self.text}")

    def tell(self, found: dict[str, float]) -> None:
        """Renew the bar's text, or where there is no terminal print a line twenty times in a run."""
        speed = f"loss {found['loss']:.4f} {found['images_per_second']:.0f} images/s"
        wait, memory = f"wait {found['data_wait']:.0%}", f"{found['memory_bytes'] / 2**30:.1f} GiB"
        self.text = f"{speed} {wait} {memory}"  # narrow enough for 80 columns
        self.move()
        part = max(self.config.log_every, self.steps // 20)
        if not self.console.is_terminal and (self.done // part > self.logged // part or self.done == self.steps):
            self.say(f"epoch {found['epoch']:.1f}  {speed} data {wait} {memory}  {self.time_left}")

    def say(self, text: str) -> None:
        """Print a line, the step before it."""
        self.console.print(f"step {self.done}/{self.steps}  {text}")

    def write(self, **values: int | float) -> None:
        """One line of metrics.jsonl, one TensorBoard event for each value."""
        if self.process.first:
            self.file.write(json.dumps({"step": self.done, **values}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, self.done)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For an evaluation by the first process: the others wait, and it is no time of training."""
        before = time.perf_counter()
        yield
        self.process.wait()
        self.since += time.perf_counter() - before

    @property
    def checkpoint_due(self) -> bool:
        """After `record`: whether this step ends the run, the clock says so, or a signal came."""
        late = time.perf_counter() - self.saved >= 60 * self.config.checkpoint_minutes
        return bool(self.stop) or (self.fresh and (late or self.done == self.steps))

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint of this step, from the first process."""
        if self.process.first:
            self.run.save({"step": self.done, "losses": list(self.losses), **state})
        self.saved, self.written = time.perf_counter(), self.done

    @property
    def images_per_second(self) -> float | None:
        """On average over this call; None if no line was written."""
        return self.trained / self.spent if self.trained else None
