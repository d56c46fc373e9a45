"""The run folder and what it holds."""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from leanmim import shards
from leanmim.checkpoint import all_of, load, save, whole
from leanmim.config import Config
from leanmim.errors import CannotWrite, Damaged, UserError
from leanmim.files import (
    append_line,
    existing,
    megabytes,
    readable_lines,
    readable_object,
    write_atomically,
    write_json,
    write_lines,
)
from leanmim.processes import Process

__all__ = ["Run", "load", "save", "write_atomically", "write_json"]

PATIENCE = (
    6.0  # s; with earlier versions of filelock the readers of a killed run hold its lock until they notice, after 5
)
SCHEDULERS = {"TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID": "SLURM_RESTART_COUNT"}
"""Variables of the environment: the number of a job, and how often it has been started again."""
PICTURES = ("features", "attention", "neighbours", "map")
"""What `leanmim show` may have drawn in a run folder, as NAME.png, beside reconstructions and mistakes."""
AT_THE_END = ("export", "report.html", "results.json")
AT_THE_BEGINNING = {".lock", ".lock.json", ".lock.json.part", "config.json", "config.json.part", "checkpoints"}
"""What a run has written before its configuration is whole, and after its last step."""


def job() -> dict[str, int]:
    """The jobs that this command is part of, by their numbers: how often each has been started again."""
    return {f"{name}={os.environ[name]}": int(os.environ.get(count, 0)) for name, count in SCHEDULERS.items()
            if name in os.environ}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    notes: list[str] = field(default_factory=list, compare=False, repr=False)
    """What `to_resume` found, for people to read."""

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.folder / "config.json"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """Of a fine-tuning: the weights with the highest accuracy so far."""
        return self.folder / "checkpoints" / "best.pt"

    @property
    def labels(self) -> Path:
        """Of a fine-tuning: the classes and the images that were chosen."""
        return self.folder / "labels.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object a line: what `leanmim evaluate`, `knn` and `probe` found."""
        return self.folder / "evaluations.jsonl"

    @property
    def environment(self) -> Path:
        """Versions, hardware, and what was measured of it."""
        return self.folder / "environment.json"

    @property
    def cost(self) -> Path:
        """Predicted cost, and at the end what was measured."""
        return self.folder / "cost.json"

    @property
    def trackers(self) -> Path:
        """The ids of its runs in the trackers of --track, by their names."""
        return self.folder / "trackers.json"

    def strip(self, step: int) -> Path:
        """A picture over training time, of `leanmim.pictures.over_time`."""
        return self.folder / "pictures" / f"step-{step}.png"

    def strips(self) -> dict[int, Path]:
        """Those that are there, by their steps, in order."""
        there = (path for path in (self.folder / "pictures").glob("step-*.png"))
        found = {int(number): path for path in there if (number := path.stem.removeprefix("step-")).isdecimal()}
        return dict(sorted(found.items()))

    @property
    def names(self) -> Path:
        """The images that the run goes on with: see `leanmim.train.data_list`."""
        return self.folder / "names.json"

    @property
    def changes(self) -> Path:
        """One JSON object a line: what was another when the run was continued, images or options."""
        return self.folder / "changes.jsonl"

    @property
    def skipped(self) -> Path:
        """The unreadable files, one JSON object a line."""
        return self.folder / "skipped.jsonl"

    @property
    def bad_steps(self) -> Path:
        """The steps that were skipped because a number was not finite, one JSON object a line."""
        return self.folder / "bad_steps.jsonl"

    @property
    def described(self) -> list[Path]:
        """What is written before the first step, and needed to continue."""
        return [self.config, self.names, self.labels, self.cost, self.environment]

    @property
    def lock(self) -> Path:
        """What the process holds that trains here; the file stays, the lock does not."""
        return self.folder / ".lock"

    def share(self, state: dict[str, Any], process: Process) -> dict[str, Any]:
        """Write what processes share out, from all of them; what is left for `save`. Errors as for `shards.write`."""
        if process.first:
            shards.sweep(self.last.parent, all_of(self.last))
        return shards.write(self.last.parent, state, process)

    def save(self, state: dict[str, Any], keep: int = 1) -> None:
        """Write the newest checkpoint, and keep so many of them. Errors as for `checkpoint.save`."""
        save(self.last, state, keep)

    def read(self) -> dict[str, Any]:
        """The newest checkpoint.

        Raises:
            UserError: this is not a run folder, or its checkpoint is missing or damaged.
        """
        if not self.config.is_file():
            raise UserError(f"{str(self.folder)!r} is not a run folder of `leanmim pretrain`: it has no config.json")
        if not all_of(self.last):
            raise UserError(f"{str(self.folder)!r} has no checkpoint yet; let the run go on")
        return load(self.last)

    def calibration(self, afresh: bool) -> Any:
        """What an earlier call of this run has measured, as it is in environment.json; None if nothing can be read.

        Args:
            afresh: whether what is in the folder is overwritten, unless this job itself began it.
        """
        if afresh and not self.begun_by_this_job():
            return None
        return readable_object(self.environment).get("calibration")

    def stored(self) -> dict[str, Any]:
        """The configuration in the folder, or if that is torn in its newest good checkpoint; empty if none can be read:
        `to_resume` says what is wrong.
        """
        try:
            stored = json.loads(self.config.read_text(encoding="utf-8"))
        except OSError:
            return {}
        except ValueError:
            for file in all_of(self.last):
                with suppress(UserError):
                    return load(file)["config"]
            return {}
        return stored if isinstance(stored, dict) else {}

    def begun_by_this_job(self) -> bool:
        """Whether the same job began this run, and torchrun or a scheduler has started it again since."""
        begun = readable_object(self.folder / "job.json")
        return any(name in begun and count > begun[name] for name, count in job().items())

    def to_resume(self, config: Config, overwrite: bool = False) -> dict[str, Any] | None:
        """The checkpoint to continue from, or None to start afresh. Nothing is written.

        If the newest one is damaged or away, it is one before it, and `notes` says so.

        Args:
            config: of the command; a stored one may differ in its ``FREE`` fields only.
            overwrite: start afresh, whatever run the folder holds, unless this job began it and was started again.

        Raises:
            UserError: the folder holds another run, or something else, and may not be replaced.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {str(self.folder)!r} is a file; give a folder")
        if not self.folder.exists() or self.hardly_begun(config):
            return None
        stored = self.stored()
        if not stored.keys() & config.to_json().keys():
            raise UserError(f"--out {str(self.folder)!r} is not empty and not a run of leanmim; choose another folder")
        changes = config.changes(stored)
        if overwrite and (changes or not self.begun_by_this_job()):
            return None
        if changes:
            raise UserError(
                "\n  ".join([f"--out {str(self.folder)!r} holds a run of another configuration:", *changes])
                + "\nChoose another --out, give the same options to continue it, or --overwrite to start afresh"
            )
        if there := all_of(self.last):
            state = self.first_good([self.last, *(file for file in there if file != self.last)])
            if changes := config.changes(state["config"]):
                raise UserError(
                    "\n  ".join([f"{str(self.last)!r} is a checkpoint of another configuration:", *changes])
                )
            return state
        if any((self.folder / name).exists() for name in AT_THE_END):
            raise UserError(
                f"--out {str(self.folder)!r} holds a finished run whose checkpoint {str(self.last)!r} is gone: training again "
                "would remove its export, report and evaluations. Put the checkpoint back, choose another --out, or give "
                "--overwrite to start afresh"
            )
        return None

    def first_good(self, files: Sequence[Path]) -> dict[str, Any]:
        """The first of some checkpoints that is not damaged; of those before it a note.

        Raises:
            UserError: all are damaged, or one is of something else.
        """
        wrong: list[Damaged] = []
        for file in files:
            try:
                state = load(file, resume=True)
            except Damaged as error:
                wrong.append(error)
            except UserError as error:
                raise UserError(f"cannot continue: {error}; or start afresh with --overwrite") from error
            else:
                self.notes.extend(f"{error}. Going on from the one before, {str(file)!r}" for error in wrong)
                return state
        raise UserError(f"cannot continue: {wrong[0]}; or start afresh with --overwrite") from wrong[0]

    def hardly_begun(self, config: Config) -> bool:
        """Whether the folder holds no more than a run that was killed before its configuration was whole."""
        if {path.name for path in self.folder.iterdir()} - AT_THE_BEGINNING or any(self.last.parent.glob("*.pt")):
            return False
        return not self.config.exists() or text_of(config).startswith(self.config.read_bytes().rstrip(b"\0"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains in this folder; when the process ends, however it ends, another may.

        Raises:
            UserError: another process does.
            CannotWrite: the folder cannot be made.
        """
        self.make()
        holder, lock = self.folder / ".lock.json", FileLock(self.lock, timeout=PATIENCE)
        try:
            lock.acquire()
        except Timeout:
            who = readable_object(holder)
            raise UserError(
                f"another process trains in --out {str(self.folder)!r} (number {who.get('pid', 'unknown')} on "
                f"{who.get('host', 'an unknown machine')}); wait for it, end it, or choose another --out"
            ) from None
        except OSError as error:
            raise self.not_made(error) from error
        try:
            write_json(holder, {"pid": os.getpid(), "host": platform.node()})
            yield
        finally:
            with suppress(OSError):  # nobody reads it without the lock
                holder.unlink()
            lock.release()

    def make(self) -> None:
        """Make the folder.

        Raises:
            CannotWrite: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.not_made(error) from error

    def not_made(self, error: OSError) -> CannotWrite:
        """What to say of a folder that cannot be made, or written to."""
        return CannotWrite(f"--out {str(self.folder)!r} cannot be made ({error}); choose another folder")

    def check_room(self, model: nn.Module, keep: int, copies: int = 0) -> None:
        """Raise UserError if the disk has no room for the checkpoints to come: those that are kept, and one being written.

        Args:
            model: that is trained; a checkpoint holds its weights and two moments of each.
            keep: how many checkpoints.
            copies: further copies of the weights in each.
        """
        weights = sum(4 * p.numel() for p in model.parameters())
        there = (file for file in self.last.parent.rglob("*") if file.is_file())
        needed = round(1.2 * (3 + copies) * weights) * (keep + 1) - sum(file.stat().st_size for file in there)
        free = shutil.disk_usage(existing(self.folder)).free
        if needed > free:
            raise CannotWrite(
                f"--out {str(self.folder)!r} has {megabytes(free)} free, but {keep} checkpoints and one being written take "
                f"{megabytes(needed)}; make room, choose another --out, or a smaller --keep"
            )

    def note_change(self, step: int, **what: Any) -> None:
        """Add a line to `changes`."""
        append_line(self.changes, {"step": step, **what})

    def read_labels(self) -> dict[str, Any]:
        """What `labels` holds.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            return json.loads(self.labels.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{str(self.labels)!r} cannot be read ({error}); put it back, or start afresh with --overwrite"
            ) from error

    def prepare(self, config: Config, step: int) -> None:
        """Make the folder ready to continue after ``step`` steps; 0 starts afresh. Killed at any moment, it can be done again.

        Raises:
            CannotWrite: it cannot be made.
        """
        self.make()
        if step == 0:  # of an earlier run only what leanmim wrote is removed
            for name in ("checkpoints", "tensorboard", "export", "probe", "cache"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("environment.json", "cost.json", "report.html", "labels.json", "results.json", "predictions.csv",
                         "confusion.png", "mistakes.png", "job.json"):  # fmt: skip
                (self.folder / name).unlink(missing_ok=True)
            pictures = (
                *(self.folder / f"{name}.png" for name in ("reconstructions", "over-time", *PICTURES)),
                *self.folder.glob("reconstructions-segment*.png"),
            )
            for path in (
                *pictures,
                self.metrics,
                self.evaluations,
                self.skipped,
                self.names,
                self.changes,
                self.bad_steps,
                self.trackers,
            ):
                path.unlink(missing_ok=True)
        for after, path in self.strips().items():
            if after > step or step == 0:
                path.unlink()
        write_atomically(self.config, lambda file: file.write_bytes(text_of(config)))
        if step == 0 and (begun := job()):
            write_json(self.folder / "job.json", begun)
        for path in (self.metrics, self.bad_steps):  # lines written after the checkpoint will be written again
            if path.exists():
                there = readable_lines(path)
                write_lines(path, [line for line in there if whole(line.get("step")) and line["step"] <= step])


def text_of(config: Config) -> bytes:
    """What config.json holds."""
    return (json.dumps(config.to_json(), indent=2) + "\n").encode()


def run_of(path: Path) -> Run:
    """The run whose folder is named, or a checkpoint in it."""
    if path.is_file():
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return Run(path)
