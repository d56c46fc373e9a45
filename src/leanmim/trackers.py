"""Experiment trackers beside TensorBoard (--track): the lines of metrics.jsonl under their own names, the pictures over
training time, the configuration once.

A tracker's run goes on when a run is continued; trackers.json in the run folder has its id. What the tracker lacks, because it could
not be reached or was asked for later, is sent again from metrics.jsonl.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Protocol, runtime_checkable

from leanmim.config import Logging
from leanmim.errors import UserError
from leanmim.files import readable_lines, readable_object
from leanmim.run import Run, write_json

PATIENCE = 30.0  # s, at the end, for what was not sent yet
PROJECT = "leanmim"

Line = Mapping[str, int | float]


class Picture(NamedTuple):
    """A PNG file of a step."""

    step: int
    name: str
    file: Path


@runtime_checkable
class Tracker(Protocol):
    """A run in a tracker.

    Args:
        run: whose lines it gets.
        config: of the run, logged where the tracker's run is new.
        id: of the tracker's run to go on with; None makes a new one.
    """

    id: str
    """By which the tracker finds its run again."""
    seen: int
    """The last step that it has; -1 is none."""

    def __init__(self, run: Run, config: Logging, id: str | None) -> None: ...

    def log(self, lines: Sequence[Line]) -> None:
        """Send lines, all or none; raises whatever the tracker's library does."""

    def show(self, picture: Picture) -> None:
        """Send a picture; raises as `log`."""

    def close(self, good: bool) -> None:
        """Nothing more comes; ``good`` if the run is done."""


class WandB:
    """Weights & Biases, in the project of WANDB_PROJECT; with WANDB_MODE=offline its files in the run folder are for `wandb sync`."""

    def __init__(self, run: Run, config: Logging, id: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.name,
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            id=id,
            resume="allow",
            config=None if id else config.to_json(),
            settings=wandb.Settings(console="off"),
        )
        self.id, self.seen = self.run.id, self.run.step - 1  # its step is the next one

    def log(self, lines: Sequence[Line]) -> None:
        """As `Tracker.log`."""
        for line in lines:
            self.run.log(values_of(line), step=line["step"])

    def show(self, picture: Picture) -> None:
        """As `Tracker.show`."""
        import wandb

        self.run.log({picture.name: wandb.Image(str(picture.file))}, step=picture.step)

    def close(self, good: bool) -> None:
        """As `Tracker.close`."""
        self.run.finish(exit_code=0 if good else 1)


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    PARAMETERS = 100  # that a request may hold

    def __init__(self, run: Run, config: Logging, id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if id is not None:
            self.id = id
            self.client.update_run(id, status="RUNNING")
            self.seen = max((metric.step for metric in self.client.get_metric_history(id, "epoch")), default=-1)
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = self.client.get_experiment_by_name(name)
        experiment = there.experiment_id if there else self.client.create_experiment(name)
        self.id, self.seen = self.client.create_run(experiment, run_name=run.folder.name).info.run_id, -1
        known = [Param(key, str(value)) for key, value in config.to_json().items()]
        for first in range(0, len(known), self.PARAMETERS):
            self.client.log_batch(self.id, params=known[first : first + self.PARAMETERS])

    def log(self, lines: Sequence[Line]) -> None:
        """As `Tracker.log`."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())  # ms
        for line in lines:
            found = [Metric(key, value, now, int(line["step"])) for key, value in values_of(line).items()]
            self.client.log_batch(self.id, metrics=found)

    def show(self, picture: Picture) -> None:
        """As `Tracker.show`."""
        self.client.log_artifact(self.id, str(picture.file), picture.name)

    def close(self, good: bool) -> None:
        """As `Tracker.close`."""
        self.client.set_terminated(self.id, "FINISHED" if good else "FAILED")


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandB, "mlflow": MLflow}
"""By the name that --track gives, which is also that of the package."""


def values_of(line: Line) -> dict[str, float]:
    """What a line says of its step."""
    return {key: float(value) for key, value in line.items() if key != "step"}


class Sender:
    """Sends lines and pictures from a thread of its own, so that no step waits for a network. What cannot be sent is kept, and tried again with the
    next line.

    Args:
        name: of the tracker.
        tracker: its run.
        say: tells the user.
    """

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.name, self.tracker, self.say = name, tracker, say
        self.coming: SimpleQueue[Line | Picture | bool] = SimpleQueue()
        self.kept: list[Line | Picture] = []
        self.fault: Exception | None = None
        self.told = False
        self.lost = ""  # the first picture that was not taken, and why
        self.told_lost = False
        self.thread = Thread(target=self.send, daemon=True, name=f"leanmim {name}")  # a hang must not outlive the run
        self.thread.start()

    def send(self) -> None:
        """What the thread does: send each line and picture; at the end, which says whether the run is done, close."""
        while True:
            coming = self.coming.get()
            try:
                if isinstance(coming, bool):
                    self.send_kept()
                    return self.tracker.close(coming)
                self.kept.append(coming)
                self.send_kept()
            except Exception as error:  # of the network, of the tracker: `tell` has it
                self.fault = error
                if isinstance(coming, bool):
                    return
            else:
                self.fault = None

    def send_kept(self) -> None:
        """One by one, so that none is sent twice. No line waits for a picture: one that is not taken is left out."""
        while self.kept:
            first = self.kept[0]
            if isinstance(first, Picture):
                try:
                    self.tracker.show(first)
                except Exception as error:  # of the network, of the tracker, of the file: `tell` has it
                    self.lost = self.lost or f"{first.file.name} ({type(error).__name__}: {error})"
            else:
                self.tracker.log([first])
            self.kept.pop(0)

    def add(self, what: Line | Picture) -> None:
        """A line or a picture to send."""
        self.coming.put(what)
        self.tell()

    def tell(self) -> None:
        """Say what cannot be sent, once until it can be again."""
        self.tell_lost()
        if (fault := self.fault) and not self.told:
            self.say(
                f"{self.name}: {type(fault).__name__}: {fault}. Training goes on, and tries again with the next line"
            )
        self.told = fault is not None

    def tell_lost(self) -> None:
        """Say once that pictures are not taken."""
        if self.lost and not self.told_lost:
            self.say(f"{self.name} did not take {self.lost}; pictures that it does not take are left out")
            self.told_lost = True

    def close(self, good: bool) -> None:
        """Nothing more comes; wait for what is on its way."""
        self.coming.put(good)
        self.thread.join(PATIENCE)
        self.tell_lost()
        if self.thread.is_alive() or self.fault:
            self.say(
                f"{self.name} lacks the last lines of metrics.jsonl ({self.fault or f'no answer in {PATIENCE:g} s'}); they are sent "
                "when the same command is given again"
            )


def track(run: Run, config: Logging, say: Callable[[str], None]) -> list[Sender]:
    """Open the trackers that a run reports to, and send what they lack of its log.

    Raises:
        UserError: one that the run did not report to before cannot be opened. Of another it is told.
        CannotWrite: its id cannot be stored.
    """
    ids, senders = readable_object(run.trackers), []
    for name in config.track:
        try:
            tracker = TRACKERS[name](run, config, ids.get(name))
        except Exception as error:  # of the network, of the tracker: each library has its own
            text = f"--track {name} cannot be opened ({type(error).__name__}: {error})"
            if name not in ids:
                raise UserError(f"{text}; see to its login and address, or leave it out") from error
            say(f"{text}. Training goes on; what {name} lacks is sent when the run is continued")
            continue
        if ids.get(name) != tracker.id:
            ids[name] = tracker.id
            write_json(run.trackers, ids)
        sender = Sender(name, tracker, say)
        missed: list[Line | Picture] = [line for line in readable_lines(run.metrics) if line["step"] > tracker.seen]
        missed += [
            Picture(step, "reconstructions_over_time", path)
            for step, path in run.strips().items()
            if step > tracker.seen
        ]
        for what in sorted(missed, key=lambda what: what.step if isinstance(what, Picture) else what["step"]):
            sender.add(what)
        senders.append(sender)
    return senders
