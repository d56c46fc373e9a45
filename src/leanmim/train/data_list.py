"""The images that a run began with: what they are called, how large their files are, and what has changed since."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from leanmim.data import Source
from leanmim.data.labels import Labels
from leanmim.data.source import sizes_of
from leanmim.errors import UserError
from leanmim.files import write_atomically
from leanmim.names import one_line
from leanmim.processes import Process
from leanmim.run import Run

SHOWN = 3  # names in a message
KEPT = 20  # names of each kind in changes.jsonl


@dataclass(frozen=True)
class DataList:
    """The images of a run, in order."""

    names: list[str]
    sizes: list[int | None]
    """Bytes of their files; None of what is no file."""
    images: int
    """To train with, of the run's beginning: they set the steps of an epoch, and so the schedule."""
    processes: int
    """Of the run's beginning: with batch and accumulation they set the images of a step."""

    @classmethod
    def of(cls, source: Source, images: int, processes: int) -> "DataList":
        """That of a source, for a run that begins."""
        return cls(list(source.names), sizes_of(source), images, processes)

    def in_place_of(self, before: "DataList | None") -> "DataList":
        """These images in a run that began with others."""
        return replace(self, images=before.images, processes=before.processes) if before else self

    @property
    def digest(self) -> str:
        """The same for the same names and sizes."""
        return hashlib.sha256(json.dumps([self.names, self.sizes]).encode()).hexdigest()


@dataclass(frozen=True)
class Changes:
    """What is different between two lists of images; all three are empty where only the order is another."""

    added: list[str]
    removed: list[str]
    changed: list[str]
    """Files of another size."""

    def __str__(self) -> str:
        kinds = ((self.added, "added"), (self.removed, "removed"), (self.changed, "of another size"))
        lines = [
            f"{len(names)} {what}: {', '.join(map(one_line, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''}"
            for names, what in kinds
            if names
        ]
        return "\n  ".join(lines or ["the same names in another order"])

    def to_json(self) -> dict[str, Any]:
        """For changes.jsonl: how many of each kind, and the first names."""
        kinds = asdict(self)
        return {kind: len(names) for kind, names in kinds.items()} | {
            "names": {kind: names[:KEPT] for kind, names in kinds.items()}
        }


def compared(before: DataList, now: DataList) -> Changes | None:
    """What is different; None if nothing is. A size that is not known equals all."""
    if (before.names, before.sizes) == (now.names, now.sizes):
        return None
    old, new = (dict(zip(data.names, data.sizes, strict=True)) for data in (before, now))
    changed = [
        name for name in sorted(old.keys() & new) if None not in (old[name], new[name]) and old[name] != new[name]
    ]
    if before.names == now.names and not changed:
        return None
    return Changes(sorted(new.keys() - old), sorted(old.keys() - new), changed)


def read_list(run: Run, process: Process) -> DataList | None:
    """The list of a run folder; None if it has none, as those of version 0.1.0. An earlier version kept names only: its runs go
    on with as many processes as there are.

    Raises:
        UserError: it is damaged.
    """
    if not run.names.is_file():
        return None
    try:
        found = json.loads(run.names.read_text())
        if isinstance(found, list):
            return DataList(found, [None] * len(found), len(found), process.replica.world)
        data = DataList(**found)
        if len(data.names) != len(data.sizes):
            raise ValueError(f"{len(data.names)} names, {len(data.sizes)} sizes")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{str(run.names)!r}, the list of the images that the run began with, is damaged ({error}); put a good copy in its "
            "place, or remove it to go on with the images that there are now"
        ) from error
    return data


def as_labelled(labels: Labels, process: Process) -> DataList:
    """The list of a fine-tuning by an earlier version, which kept labels.json only."""
    names = labels.train + labels.val
    return DataList(names, [None] * len(names), len(labels.train), process.world)


def check_unchanged(before: DataList | None, now: DataList, data_changed: str) -> Changes | None:
    """What has changed since the run began, if that is accepted.

    Raises:
        UserError: something has, and it is not accepted.
    """
    changes = compared(before, now) if before else None
    if changes and data_changed == "refuse":
        raise UserError(
            f"the images in --data are not those that the run began with:\n  {changes}\nPut them back, or give --data-changed "
            "accept to go on with those that there are now, or start afresh in another --out (or with --overwrite)"
        )
    return changes


def check_alike(process: Process, value: Any, what: str) -> None:
    """Raise UserError if the processes do not see the same ``what``, of which ``value`` is a digest."""
    seen = process.gather(value)
    if others := [str(rank) for rank, theirs in enumerate(seen) if theirs != seen[0]]:
        raise UserError(
            f"not all {process.world} processes see the same {what}: other than rank 0 does rank {', '.join(others)}; give a "
            "folder that is the same for all, on a network drive for example, and let nobody write to it meanwhile"
        )


def keep_list(run: Run, now: DataList, changes: Changes | None, step: int) -> None:
    """Write down the images that the run goes on with after ``step`` steps, and what has changed among them."""
    if changes:
        run.note_change(step, **changes.to_json())
    write_atomically(run.names, lambda file: file.write_text(json.dumps(vars(now))))  # asdict would copy every name


def other_images(changes: Changes | None, now: DataList) -> Iterator[str]:
    """What is said of accepted changes before the first step."""
    if changes:
        yield (
            f"the images in --data are not those that the run began with, as accepted:\n  {changes}\n  an epoch keeps the steps of "
            f"the {now.images} images of the beginning"
        )
