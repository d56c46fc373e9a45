"""The unreadable files of a run."""

import json

from torch import Tensor

from leanmim.data import Bad
from leanmim.errors import UserError
from leanmim.processes import Process
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
        self.seen: dict[str, str] = {}
        if run.skipped.exists():
            self.seen = {line["path"]: line["reason"] for line in map(json.loads, run.skipped.read_text().splitlines())}

    def add(self, found: list[Bad]) -> None:
        """Record new ones.

        Raises:
            UserError: their share of all images is over the limit.
        """
        for bad in found:
            if bad.path not in self.seen:
                self.seen[bad.path] = bad.reason
                if self.process.first:
                    with open(self.run.skipped, "a") as file:
                        file.write(json.dumps({"path": bad.path, "reason": bad.reason}) + "\n")
        if len(self.seen) > self.limit * self.total:
            raise UserError(
                f"{len(self.seen)} of {self.total} image files cannot be read, more than --max-bad-share {self.limit}; "
                f"they are listed in {self.run.skipped}; mend or remove them, or raise the share"
            )

    def filter(self, batch: tuple[Tensor, list[Bad]]) -> Tensor:
        """The images of a batch; those that could not be read are recorded. Errors as for `add`."""
        images, found = batch
        self.add(found)
        return images

    def merge(self) -> None:
        """Learn what the other processes met."""
        for others in self.process.gather(list(self.seen.items())):
            self.add([Bad(*item) for item in others])
