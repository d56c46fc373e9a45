"""The unreadable files of a run."""

from collections.abc import Iterable

from rich.console import Console
from torch import Tensor

from leanmim.data import Bad, Source
from leanmim.data.source import read
from leanmim.errors import UserError
from leanmim.files import append_line, readable_lines, write_lines
from leanmim.processes import Process
from leanmim.progress import track
from leanmim.run import Run


class BadFiles:
    """Those met so far, listed in skipped.jsonl; too many end the run.

    Args:
        run: where they are listed.
        total: images of the data.
        limit: largest share of them.
        process: the first one writes.
    """

    def __init__(self, run: Run, total: int, limit: float, process: Process) -> None:
        self.run, self.total, self.limit, self.process = run, total, limit, process
        lines = [line for line in readable_lines(run.skipped) if {"path", "reason"} <= line.keys()]
        self.seen: dict[str, str] = {str(line["path"]): str(line["reason"]) for line in lines}
        self.listed = set(self.seen)  # a full disk leaves the list behind

    def retry(self, sources: Iterable[Source], console: Console) -> None:
        """Before a run goes on, take off the list what can be read now, and what is no longer among the images.

        Only the list changes: which image takes the place of an unreadable one follows from the order alone.
        """
        before = len(self.seen)
        if self.process.first and before:
            places = [(source, i) for source in sources for i in range(len(source)) if source.where(i) in self.seen]
            found = (read(source, i) for source, i in track(places, f"{before} unreadable files again", len(places)))
            self.seen = {bad.path: bad.reason for bad in found if isinstance(bad, Bad)}
            write_lines(self.run.skipped, [{"path": path, "reason": why} for path, why in self.seen.items()])
        self.seen = self.process.gather(self.seen)[0]
        self.listed = set(self.seen)
        if len(self.seen) < before:
            console.print(f"{before - len(self.seen)} of {before} files that could not be read can be now, or are gone")

    def add(self, found: list[Bad]) -> None:
        """Record new ones.

        Raises:
            UserError: their share of all images is over the limit.
        """
        for bad in found:
            self.seen.setdefault(bad.path, bad.reason)
        if self.process.first and len(self.listed) < len(self.seen):
            self.write()
        if len(self.seen) > self.limit * self.total:
            raise UserError(
                f"{len(self.seen)} of {self.total} image files cannot be read, more than --max-bad-share {self.limit}; "
                f"they are listed in {self.run.skipped}; mend them, or remove them and give --data-changed accept, or raise "
                "the share: the same command then goes on from the last checkpoint"
            )

    def write(self) -> None:
        """List those that are not listed yet; where the disk is full, later."""
        for path in [path for path in self.seen if path not in self.listed]:
            try:
                append_line(self.run.skipped, {"path": path, "reason": self.seen[path]})
            except OSError:
                return
            self.listed.add(path)

    def filter(self, batch: tuple[Tensor, list[Bad]]) -> Tensor:
        """The images of a batch; those that could not be read are recorded. Errors as for `add`."""
        images, found = batch
        self.add(found)
        return images

    def merge(self) -> None:
        """Learn what the other processes met."""
        for others in self.process.gather(list(self.seen.items())):
            self.add([Bad(*item) for item in others])
