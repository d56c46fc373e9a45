"""Tar files at URLs: each is copied once into a cache, by the library webdataset, and read from there.

So order, crops and continuation are those of local files.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock

from leanmim.data.source import has_braces
from leanmim.data.tar import Tar, read_index
from leanmim.errors import UserError
from leanmim.files import REMEDIES, cannot_write, existing, megabytes, write_atomically
from leanmim.progress import track

Opener = Callable[[str], BinaryIO]
SCHEMES = ("http", "https", "ftps", "sftp", "scp", "s3", "gs", "htgs", "hf", "ais")
"""Those that webdataset opens, by curl, gsutil and ais. Not pipe, which starts any program: whoever opens a run folder of others
opens its data."""
CACHE = "LEANMIM_CACHE"
"""Environment variable: the folder of the cache, ~/.cache/leanmim unless given."""


def open_remote(data: str, channels: int) -> Tar | None:
    """The source of tar files at URLs or with braces in their names, as "https://host/a-{000..010}.tar"; None if --data names
    something else.

    Raises:
        UserError: webdataset is not installed or does not open such URLs, or a file is missing, broken, or does not fit on the
            disk.
    """
    scheme, separator, _ = data.partition(":")
    if scheme == "pipe" and separator and not os.path.exists(data):
        raise UserError(f"--data {data!r} would start a program; run it yourself, and give the file that it writes")
    url = scheme in SCHEMES and "://" in data
    if not url and not (has_braces(data) and data.endswith(".tar")):
        return None
    try:
        from braceexpand import braceexpand
        from webdataset import gopen
    except ImportError as error:
        raise UserError(
            'URLs and names with braces need the library webdataset: pip install "leanmim[webdataset]"'
        ) from error
    names = list(braceexpand(data))
    return Tar(fetched(names, gopen) if url else names, channels)


def fetched(urls: list[str], gopen: Opener) -> list[Path]:
    """Where the files of URLs are in the cache; those that are not there are fetched, one after the other.

    Raises:
        UserError: one is missing or broken, or there is no room. Those that were fetched stay.
    """
    places = [place_of(url) for url in urls]
    missing = [(url, place) for url, place in zip(urls, places, strict=True) if not place.is_file()]
    if missing:
        print(f"leanmim: {len(missing)} of {len(urls)} tar files are copied to {cache()} ({CACHE})", file=sys.stderr)
    sizes: list[int] = []
    for url, place in track(missing, f"fetching {len(missing)} tar files", len(missing)):
        if sizes:
            check_room(len(missing) - len(sizes), sum(sizes) // len(sizes))
        fetch(url, place, gopen)
        sizes.append(place.stat().st_size)
    return places


def cache() -> Path:
    """The folder of the cache."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "leanmim")


def place_of(url: str) -> Path:
    """Where the file of a URL is kept, by the name that it has there."""
    parts = urlsplit(url)
    name = Path(parts.path).name or parts.netloc
    return cache() / "shards" / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def check_room(files: int, size: int) -> None:
    """Raise UserError if so many files of so many bytes do not fit on the disk."""
    free = shutil.disk_usage(existing(cache())).free
    if files * size > free:
        raise UserError(
            f"{files} more tar files take about {megabytes(files * size)} in {str(cache())!r}, {megabytes(free)} are free; make room, "
            f"choose another folder ({CACHE}), or give fewer; those that were fetched stay"
        )


def fetch(url: str, place: Path, gopen: Opener) -> None:
    """Copy a tar file and look through it; of several processes one does.

    Raises:
        UserError: it cannot be fetched or is no tar file.
        CannotWrite: the disk is full or cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(".lock")):
            if not place.is_file():
                write_atomically(place, lambda part: download(url, part, gopen))
    except OSError as error:
        raise cannot_write(place, error) from error


def download(url: str, part: Path, gopen: Opener) -> None:
    """Fill a file. Errors as for `fetch`."""
    try:
        with gopen(url) as stream, open(part, "wb") as file:
            shutil.copyfileobj(stream, file, 2**20)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in REMEDIES:  # the disk's
            raise
        raise UserError(
            f"{url!r} cannot be fetched ({error}); see whether it is there, then give the same command again"
        ) from error
    try:
        read_index(part)
    except UserError as error:
        raise UserError(f"{url!r} is no whole tar file of images: {error}") from error
