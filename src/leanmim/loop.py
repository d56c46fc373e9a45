"""The one resumable loop: clock, progress, log, TensorBoard, trackers, checkpoints, signals, agreement among processes.

It never knows what a step is.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from leanmim.config import Logging
from leanmim.device import peak_memory
from leanmim.errors import CannotWrite, UserError
from leanmim.files import write_atomically
from leanmim.log import Growing, Log, as_line
from leanmim.processes import Process
from leanmim.progress import console_of, progress_bar, time_left, watched
from leanmim.run import Run
from leanmim.signals import Stopped, heeded
from leanmim.trackers import Picture, Sender, track

T = TypeVar("T")
IDLE = 0.1  # share of the time, from which on waiting for images is worth a word
PATIENCE = 30.0  # s of training before it: the readers have started
ADVICE = (
    "lower --blr, set --clip-grad, or use --precision fp32: the same command with one of these continues from the last "
    "checkpoint, if one was written"
)


class Arriving:
    """The losses of a step on their way to the host. On a CUDA device nobody waits for them before they are read.

    Args:
        losses: on the device.
        step: that has these losses.
        lr: of the step.
    """

    def __init__(self, losses: Float[Tensor, " s"], step: int, lr: float) -> None:
        self.step, self.lr = step, lr
        self.losses = losses.to("cpu", non_blocking=losses.is_cuda)  # then into pinned memory
        self.event = torch.cuda.Event() if losses.is_cuda else None
        if self.event:
            self.event.record()

    def read(self) -> list[float]:
        """The numbers, as soon as they are there."""
        if self.event:
            self.event.synchronize()
        return self.losses.tolist()


class Loop:
    """Steps from the last checkpoint on.

        with Loop(...) as loop:
            for step in loop.until(steps):
                losses = ...
                loop.record(losses, images=..., epoch=..., lr=...)
                if loop.checkpoint_due:
                    loop.save(state)

    Signals: a first one (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) asks for a checkpoint of the step at hand, or on a GPU of the next one, and then raises
    `Stopped`: the command line exits with 128 + the signal's number. An evaluation is finished before. A second one ends at
    once.

    Steps that are not finite: a NaN among the losses says that the step was skipped. That is told, listed in bad_steps.jsonl,
    and if it happens too often in a row the end. On a CUDA device the losses are looked at one step later, so that nobody
    waits for them; all processes look at the same step.

    Disk faults: training goes on, and what could not be written is tried again with the next line of the log or checkpoint;
    at the end of the run, or where a signal asked for a checkpoint, the fault is an error. No checkpoint is newer than the
    log, so that a line is never missing.

    Trackers (--track) that cannot be reached do not end training either: see `leanmim.trackers`.

    Args:
        run: where the log and the checkpoints go; the first process writes them.
        config: how often, and how many checkpoints are kept.
        steps: of the whole run.
        state: the checkpoint to continue from, if any.
        process: this one among all.
        device: whose memory is logged.
        title: of the progress bar.
        console: where lines and the bar go; None is the standard output, of the first process only.
        max_bad_steps: so many steps in a row may be skipped.
        diagnose: what reproduces a step that was skipped, and where in it numbers are not finite first, for bad_steps.jsonl.
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
        max_bad_steps: int = 0,
        diagnose: Callable[[int], dict[str, Any]] = lambda step: {},
    ) -> None:
        self.run, self.config, self.steps, self.process, self.device = run, config, steps, process, device
        self.start = self.done = self.logged = state["step"] if state else 0
        self.losses: list[Tensor] = []  # since the last line, for each step those of all segments
        if state and "losses" in state:
            self.losses = [losses.to(device) for losses in state["losses"]]
        self.logged -= len(self.losses)
        self.arriving: list[Arriving] = []  # of steps that were not looked at
        self.skipped = state.get("bad_steps", 0) if state else 0  # steps in a row
        self.max_bad_steps, self.diagnose = max_bad_steps, diagnose
        self.console = console or console_of(quiet=not process.first)
        self.progress = progress_bar(self.console, transient=False, disable=not process.first or self.done == steps)
        self.text = ""  # of the bar, as of the last line
        self.task = self.progress.add_task(title, total=steps, completed=self.start, text="")
        self.signal = 0  # the first one that came here
        self.stop = 0  # the one that all processes know of
        self.early = state is None  # the first checkpoint does not wait for the clock
        self.late = False  # whether by the clock of any process a checkpoint was due at the step at hand
        self.begun = self.done  # steps; in a pipeline some processes are ahead
        self.meeting = -1  # the step after which the checkpoint comes that was wanted while some were ahead
        self.written = -1  # step of the newest checkpoint of this call
        self.faults: set[str] = set()  # of the disk, that were told
        self.trackers: list[Sender] = []
        self.waited, self.images, self.fresh = 0.0, 0, True
        # of all lines of this call: seconds, images, seconds of waiting
        self.spent, self.trained, self.idle = 0.0, 0, 0.0
        self.advised = False  # about the waiting

    def __enter__(self) -> "Loop":
        """Open the log, listen to signals."""
        if self.process.first:
            self.log, self.bad = Log(self.run), Growing(self.run.bad_steps)
            self.described = {path: path.read_bytes() for path in self.run.described if path.exists()}
            self.flush()
            self.trackers = track(self.run, self.config, self.console.print)
        self.handlers = {number: signal.signal(number, self.heard) for number in heeded()}
        self.progress.start()
        self.began = self.since = self.saved = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Listen no longer, close the trackers."""
        self.progress.stop()
        self.unlisten()
        for tracker in self.trackers:
            tracker.close(kind is None)
        self.trackers = []

    def heard(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal; from then on they do what they did before."""
        self.signal = number
        if number == getattr(signal, "SIGHUP", None):
            self.console.quiet = True  # the terminal is gone
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
                raise Stopped(self.stop, f" after step {self.done}, with a checkpoint")

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

    def record(
        self,
        losses: Float[Tensor, " s"],
        *,
        images: int,
        epoch: float,
        lr: float,
        line: bool = False,
        begun: int | None = None,
    ) -> None:
        """The step at hand is done; from time to time write a line.

        Args:
            losses: one for each segment, on the device.
            images: of this step, over all processes.
            epoch: epochs done, a fraction.
            lr: learning rate of this step.
            line: write a line now, whatever --log-every says.
            begun: steps that a process has begun: in a pipeline some are ahead. None is those that are done.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        self.done += 1
        self.move()
        self.losses.append(losses)
        self.images += images
        every = self.config.log_every
        self.fresh = line or self.done % every == 0 or self.done == self.steps or not self.config.checkpoint_minutes
        self.arriving.append(Arriving(self.with_flags(losses), self.done, lr))
        now = self.fresh or self.early
        self.look(len(self.arriving) - (losses.is_cuda and not now))
        if now or self.stop:  # a checkpoint may follow
            self.look(len(self.arriving))
            self.losses = list(self.process.mean(torch.cat(self.losses)).split(len(losses)))
        if self.fresh:
            self.write_line(epoch, lr)
        self.begun = begun or self.done
        if self.checkpoint_wanted and self.meeting < self.done:
            self.meeting = self.begun

    def with_flags(self, losses: Float[Tensor, " s"]) -> Float[Tensor, " s+2"]:
        """The losses, and behind them the signal that came to any process, and whether it is late for any."""
        late = time.perf_counter() - self.saved >= 60 * self.config.checkpoint_minutes
        flags = torch.cat([torch.full_like(losses[:1], flag) for flag in (self.signal, late)])
        return torch.cat([losses, self.process.most(flags)])

    def look(self, count: int) -> None:
        """Look at the losses of so many steps, and whether to stop. Errors as for `record`."""
        for _ in range(count):
            arrived = self.arriving.pop(0)
            *losses, stop, late = arrived.read()
            self.stop, self.late = self.stop or int(stop), bool(late)
            good = all(map(math.isfinite, losses))
            self.skipped = 0 if good else self.skipped + 1
            if not good:
                self.tell_skipped(arrived.step, arrived.lr, losses)

    def tell_skipped(self, step: int, lr: float, losses: list[float]) -> None:
        """List a step that was skipped. Errors as for `record`."""
        own = {"losses": [loss if math.isfinite(loss) else None for loss in losses], **self.diagnose(step - 1)}
        everywhere = self.process.gather(own)
        if self.process.first:
            for rank, found in enumerate(everywhere[: self.process.replica.world]):
                self.bad.add(as_line({"step": step, "lr": lr, "rank": rank, **found}))
        self.flush()
        named = [found["first_not_finite"] for found in everywhere if found.get("first_not_finite")]
        reason = f"{named[0] if named else 'a loss or gradient'} is not finite"
        if self.skipped > self.max_bad_steps:
            raise UserError(
                f"{reason} in step {step}, number {self.skipped} in a row ({self.run.bad_steps} lists them): training diverged. "
                f"The last checkpoint is from before and stays; {ADVICE}"
            )
        self.console.print(f"step {step}/{self.steps}  skipped, number {self.skipped} in a row: {reason}")

    def write_line(self, epoch: float, lr: float) -> None:
        """The line of the log about the steps since the last one; steps that were skipped have no part in the losses."""
        seconds = time.perf_counter() - self.since
        losses = torch.stack(self.losses)
        good = losses[losses.isfinite().all(dim=1)]
        values = good.mean(0).tolist() if len(good) else []
        found = {"epoch": epoch}
        if values:
            found["loss"] = sum(values) / len(values)
        found |= {
            "lr": lr,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
            "memory_bytes": peak_memory(self.device),
            "seconds": seconds,
        }
        if len(values) > 1:
            found |= {f"loss_{i}": value for i, value in enumerate(values)}
        if len(good) < len(losses):
            found["bad_steps"] = len(losses) - len(good)
        self.write(**found)
        self.tell(found)
        self.spent, self.trained = self.spent + seconds, self.trained + self.images
        self.idle += self.waited
        if not self.advised and self.spent > PATIENCE:
            self.advised = True
            if (share := self.idle / self.spent) > IDLE:
                self.say(
                    f"waiting for images takes {share:.0%} of the time, without it a step were {1 / (1 - share):.1f} times as fast: "
                    "give more --workers, or pack the images once (leanmim pack --help)"
                )
        self.losses, self.waited, self.images, self.logged = [], 0.0, 0, self.done
        self.since = time.perf_counter()

    @property
    def time_left(self) -> str:
        """Time that is left at the mean speed of this call, or that it took; evaluations are part of it."""
        return time_left(time.perf_counter() - self.began, self.done - self.start, self.steps - self.done)

    def move(self) -> None:
        """Move the bar to the step at hand; nothing is asked of the device."""
        self.progress.update(self.task, completed=self.done, text=f"{self.time_left} {self.text}")

    def tell(self, found: dict[str, float]) -> None:
        """Renew the bar's text, or where nobody watches it print a line twenty times in a run."""
        speed = f"loss {found.get('loss', math.nan):.4f} {found['images_per_second']:.0f} images/s"
        wait, memory = f"wait {found['data_wait']:.0%}", f"{found['memory_bytes'] / 2**30:.1f} GiB"
        self.text = f"{speed} {wait} {memory}"  # narrow enough for 80 columns
        self.move()
        part = max(self.config.log_every, self.steps // 20)
        if not watched(self.console) and (self.done // part > self.logged // part or self.done == self.steps):
            self.say(f"epoch {found['epoch']:.1f}  {speed} data {wait} {memory}  {self.time_left}")

    def say(self, text: str) -> None:
        """Print a line, the step before it."""
        self.console.print(f"step {self.done}/{self.steps}  {text}")

    def write(self, **values: int | float) -> None:
        """One line of metrics.jsonl, of its values a TensorBoard event, and a line of each tracker."""
        if self.process.first:
            line = {"step": self.done, **values}
            self.log.add(line)
            self.flush()
            for tracker in self.trackers:
                tracker.add(line)

    def picture(self, name: str, file: Path) -> None:
        """A PNG file of this step, to TensorBoard, and to the trackers while the loop runs."""
        if self.process.first:
            self.log.add_picture(name, self.done, file)
            self.flush()
            for tracker in self.trackers:
                tracker.add(Picture(self.done, name, file))

    def flush(self) -> None:
        """Write what was logged; what cannot be written waits."""
        if self.process.first:
            for part, write in (("log", self.log.flush), ("list of skipped steps", self.bad.flush)):
                try:
                    write()
                except CannotWrite as error:
                    self.tell_fault(part, error)
                else:
                    self.faults.discard(part)

    def tell_fault(self, part: str, error: CannotWrite) -> None:
        """Say what cannot be written, once until it can be again."""
        if part not in self.faults:
            self.say(f"{error}. Training goes on, and tries again to write the {part}")
        self.faults.add(part)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For an evaluation by the first process: the others wait, and it is no time of training."""
        before = time.perf_counter()
        yield
        self.process.wait()
        self.since += time.perf_counter() - before
        if self.process.world == 1 and self.signal:  # several processes agree in the next step
            self.stop = self.signal
            self.look(len(self.arriving))

    @property
    def checkpoint_wanted(self) -> bool:
        """After `record`: whether this step ends the run, the clock says so, a signal came, or there is no checkpoint yet.

        Not after a step that was skipped, which may have been for the weights' sake, unless it is the last one.
        """
        last, late = self.done == self.steps, self.fresh and self.late
        return bool(self.stop) or last or (not self.skipped and (self.early or late or self.done == self.meeting))

    @property
    def checkpoint_due(self) -> bool:
        """Whether one is wanted, and no process is ahead."""
        return self.checkpoint_wanted and self.begun == self.done

    def meets(self, done: int) -> bool:
        """Whether all processes must be there after so many steps, as far as is known: a checkpoint may be due then."""
        return self.early or not self.config.checkpoint_minutes or done in (self.meeting, self.steps)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint of this step: from the first process, and where they share out the weights from all.

        Raises:
            UserError: a weight is not finite.
            CannotWrite: of the disk, at the end of the run or after a signal; else training goes on.
        """
        state = {"step": self.done, "losses": list(self.losses), "bad_steps": self.skipped, **state}
        self.saved, self.early = time.perf_counter(), False
        try:
            state = self.run.share(state, self.process)
            if self.process.first:
                self.log.lines.flush()
                for path, data in self.described.items():
                    if not path.exists():  # the folder vanished
                        write_atomically(path, partial(Path.write_bytes, data=data))
                self.run.save(state, self.config.keep)
        except CannotWrite as error:
            if self.stop or self.done == self.steps:
                raise
            return self.tell_fault("checkpoint", error)
        except UserError as error:
            raise UserError(f"after step {self.done} {error}: training diverged; {ADVICE}") from error
        self.faults.discard("checkpoint")
        self.written = self.done

    @property
    def images_per_second(self) -> float | None:
        """On average over this call; None if no line was written."""
        return self.trained / self.spent if self.trained else None
