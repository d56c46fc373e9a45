"""Which image files a folder, a pattern or a list stands for."""

import os
from collections.abc import Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path
from typing import NoReturn

from leanmim.errors import UserError

SUFFIXES = {".avif", ".bmp", ".gif", ".j2k", ".jp2", ".jpeg", ".jpg", ".jpx", ".png", ".tif", ".tiff", ".webp"}
ARRAY = ".npy"
"""Suffix of an image that is stored as an array."""
FORMATS = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES)) + ", and npy where there are no others"
TAKES = (
    "give a folder of images, a pattern such as 'photos/*/raw', a .txt list of images, tar or Parquet files, or a folder that "
    "Hugging Face's datasets saved"
)


def list_images(folder: str | Path) -> list[Path]:
    """Every image file below a folder, see `image_names`."""
    return [Path(folder, name) for name in image_names(folder)]


def image_names(folder: str | Path) -> list[str]:
    """The path below a folder of every image file in it, sorted, hidden files left out.

    What only has an image's name counts: a FIFO, a socket or a link to nowhere. Who reads it says that it is none.

    Raises:
        UserError: the folder is missing, empty, or holds no images, or it or one below it cannot be listed.
    """
    root = Path(folder)
    if not os.path.exists(root):  # False also where the system cannot say, as of a drive that is away
        raise UserError(f"there is no folder {str(root)!r}; {TAKES}")
    if not os.path.isdir(root):
        raise UserError(f"{str(root)!r} is a file; {TAKES}")
    files = walk(root)
    images = images_among(files)
    if not images:
        what = f"{len(files)} files but no images" if files else "no files"
        raise UserError(f"{str(root)!r} holds {what}; leanmim reads {FORMATS}")
    below = len(os.path.join(root, ""))
    return [image[below:] for image in images]


def match_images(pattern: str) -> list[str]:
    """Every image file that matches a pattern (``*``, ``?``, ``[]``, ``**``) or lies below a folder that does, sorted.

    Raises:
        UserError: there are none.
    """
    matches = [str(Path(match)) for match in glob(pattern, recursive=True)]
    files = [file for match in matches for file in (walk(match) if os.path.isdir(match) else [match])]
    images = once(images_among(files))
    if not images:
        what = f"matches {len(files)} files but no images" if files else "matches no files"
        raise UserError(f"{pattern!r} {what}; leanmim reads {FORMATS}")
    return images


def read_list(path: Path) -> list[str]:
    """The lines of a list of image files, one path a line, relative to the list's folder; empty lines are left out.

    Raises:
        UserError: there are no lines, or some name no file.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"the list {str(path)!r} cannot be read ({error}); it is text in UTF-8, one path a line"
        ) from error
    if not lines:
        raise UserError(f"the list {str(path)!r} is empty; it holds the paths of image files, one a line")
    if missing := [line for line in lines if not os.path.isfile(os.path.join(path.parent, line))]:
        more = ", ..." if len(missing) > 3 else ""
        raise UserError(
            f"{len(missing)} of {len(lines)} lines of {str(path)!r} name no file: {', '.join(missing[:3])}{more}; "
            f"paths are absolute or relative to {str(path.parent.absolute())!r}"
        )
    return once(lines, path.parent)


def walk(root: str | Path) -> list[str]:
    """Every file below a folder, hidden ones left out; links are followed, and no folder is visited twice.

    Raises:
        UserError: it or a folder below it cannot be listed, so that its images would be missing.
    """
    files: list[str] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(root, onerror=unlisted, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            files += [os.path.join(here, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return files


def unlisted(error: OSError) -> NoReturn:
    """Raise UserError for a folder that cannot be listed."""
    raise UserError(
        f"the folder {str(error.filename)!r} cannot be listed ({error.strerror}); give yourself the right to read and enter "
        "it, or move it out of the data"
    ) from error


def images_among(files: Iterable[str]) -> list[str]:
    """The files with the suffix of an image, sorted folder by folder as paths are; arrays only where there is nothing else:
    beside images they are something else, such as features.
    """
    images, arrays = list[str](), list[str]()
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        if suffix in SUFFIXES:
            images.append(file)
        elif suffix == ARRAY:
            arrays.append(file)
    return sorted(images or arrays, key=lambda file: file.split(os.sep))


def once(paths: list[str], root: str | Path = "") -> list[str]:
    """The paths, without those that lead to the same file as an earlier one; relative paths begin at ``root``."""
    first: dict[str, str] = {}
    for real, path in zip(real_paths(os.path.join(root, path) for path in paths), paths, strict=True):
        first.setdefault(real, path)
    return list(first.values())


def real_paths(files: Iterable[str]) -> Iterator[str]:
    """Where files really are, links followed; of a folder it is asked once."""
    real_folder = cache(os.path.realpath)
    for file in files:
        folder, name = os.path.split(file)
        yield os.path.realpath(file) if os.path.islink(file) else os.path.join(real_folder(folder), name)
