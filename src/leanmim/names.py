"""Names of files and classes, for people to read."""

import re
from collections.abc import Sequence
from pathlib import Path


def one_line(name: str) -> str:
    """The name as one line of UTF-8; what is neither is escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shortened(name: str, most: int) -> str:
    """The name as one line, or its beginning and end."""
    text, half = one_line(name), most // 2
    return text if len(text) <= most else f"{text[: half - 1]}...{text[-half + 2 :]}"


def slug(name: str) -> str:
    """The name as that of a folder."""
    return re.sub(r"[^\w.]+", "-", name)


def run_names(folders: Sequence[str]) -> list[str]:
    """What to call each of several runs: its folder's name; where two are called alike, the paths as given."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)  # a/run and b/run


def sides(size: Sequence[int], between: str = " x ") -> str:
    """Height and width of an image, for people to read; of a square its side."""
    return between.join(map(str, dict.fromkeys(size)))
