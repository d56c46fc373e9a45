"""What a benchmark has finished: one JSON line each, added at once and read by its next call."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """A file of entries; it need not exist."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, **entry: Any) -> None:
        """Write an entry. It begins with a line break, which ends a line that a killed process left unfinished."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write("\n" + json.dumps(entry))

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """The entries that hold all of these, in their order."""
        wanted = json.loads(json.dumps(wanted))  # a list and a tuple are the same
        return [entry for entry in self if all(entry.get(key) == value for key, value in wanted.items())]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All entries but those that are cut off."""
        for line in self.file.read_text().splitlines() if self.file.is_file() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue
