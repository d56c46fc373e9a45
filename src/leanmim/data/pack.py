"""`leanmim pack`: every photo shrunk once, into one tar file."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset
from torchvision.transforms import v2

from leanmim.config.tools import Pack
from leanmim.data.batches import CPU, loader, resolve_workers, say_once
from leanmim.data.crops import resized
from leanmim.data.find import ARRAY
from leanmim.data.read import Bad, Cut
from leanmim.data.source import Source, absolute, nothing_readable, open_source, read
from leanmim.data.strings import Strings
from leanmim.data.tar import BLOCK, MAGIC, OWN, Index, is_image
from leanmim.errors import UserError
from leanmim.files import cannot_write, existing, megabytes
from leanmim.progress import console_of, track

OPTIONS = f"{OWN}pack.json"  # the first member
UNREAD = f"{OWN}skipped/"  # below it the files that could not be read, with the reason
SAMPLE = 32  # images whose mean size is the estimate
FLUSH = 64  # images that a kill may cost


class Packed(NamedTuple):
    """An image as it will be stored, or why it cannot be read."""

    name: str
    data: bytes


class Begun(NamedTuple):
    """What an unfinished pack holds."""

    done: int
    """Images, skipped ones among them."""
    end: int
    """The byte after the last whole member."""
    images: Index


class Shrunk(Dataset):
    """The images of a source, encoded so that their short side is ``side`` px at most.

    Args:
        source: the images.
        config: size, format, quality.
    """

    def __init__(self, source: Source, config: Pack) -> None:
        self.source, self.config, self.names = source, config, Strings(source.names)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Packed:
        side, name = self.config.size, self.names[index]
        image = read(self.source, index)  # whole: it is done once
        if isinstance(image, Bad):
            return Packed(UNREAD + name, f"{image.path}: {image.reason}".encode(errors="surrogateescape"))
        assert isinstance(image, Image.Image)  # of 8 bits: `Pack` has no other channels
        width, height = image.size
        shrink = min(1.0, side / min(height, width))
        cut = Cut(np.asarray(image).reshape(height, width, -1), (0, 0, width, height))
        picture = resized(cut, (max(1, round(shrink * height)), max(1, round(shrink * width))), "bicubic")
        return Packed(*encoded(picture, name, self.config))


def encoded(picture: torch.Tensor, name: str, config: Pack) -> tuple[str, bytes]:
    """The name and the bytes of a member."""
    file = io.BytesIO()
    if config.format == "raw":
        np.save(file, picture.permute(1, 2, 0).contiguous().numpy())
        return name + ARRAY, file.getvalue()
    image: Image.Image = v2.functional.to_pil_image(picture)
    image.save(file, "JPEG", quality=config.quality)
    jpeg = os.path.splitext(name)[1].lower() in (".jpg", ".jpeg")
    return name if jpeg else f"{name}.jpg", file.getvalue()  # a.png.jpg: there may be an a.jpg, too


def pack(config: Pack) -> Path:
    """Write the images into one tar file, continuing where an earlier call was interrupted.

    Its members have the names of the files; those that could not be read stand below ``leanmim/skipped/``, with the reason.
    An index at the end makes it quick to open.

    Returns:
        The file.

    Raises:
        UserError: an option is impossible, the data cannot be read, the file is there already or another's, or there is no
            room for it.
    """
    config.check()
    out, console = Path(config.out), console_of(stderr=True)
    if out.suffix != ".tar":
        raise UserError(f"--out {config.out!r} must end in .tar, by which --data knows it")
    if out.is_dir():
        raise UserError(f"--out {config.out!r} is a folder; give the name of a file")
    source = open_source(absolute(config.data), config.channels)
    options = options_of(config, source)
    part = out.with_name(out.name + ".part")
    if config.overwrite:
        part.unlink(missing_ok=True)
    elif out.exists():
        if begun(out) != options:
            raise UserError(
                f"--out {config.out!r} is there, and not this pack of these images; choose another, or --overwrite"
            )
        print(f"{out} is complete; --overwrite packs afresh")
        return out
    images = Shrunk(source, config)
    with alone(out):
        there = recovered(part, options)
        check_room(out, images, there)
        try:
            write(part, images, options, there, console)
            os.replace(part, out)
        except OSError as error:
            raise cannot_write(part, error) from error
    packed = len(there.images.names)
    more = f"; {len(images) - packed} files could not be read, see {UNREAD} in it" if packed < len(images) else ""
    print(f"{packed} images in {out}, {megabytes(out.stat().st_size)}{more}")
    return out


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else packs into this file; when the process ends, however it ends, another may.

    Raises:
        UserError: another process does.
        CannotWrite: there can be no file.
    """
    lock = FileLock(out.with_name(out.name + ".lock"), timeout=0)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another process packs into --out {str(out)!r}; wait for it, or choose another file") from None
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def options_of(config: Pack, source: Source) -> dict[str, Any]:
    """What a pack is a function of."""
    names = hashlib.sha256(json.dumps(source.names).encode()).hexdigest()
    own = {key: value for key, value in config.to_json().items() if key in ("size", "format", "quality", "channels")}
    return own | {"images": len(source), "names": names}


def begun(path: Path) -> dict[str, Any] | None:
    """The options with which a file was begun; None if it is no pack."""
    with suppress(OSError, tarfile.TarError, ValueError), tarfile.open(path, "r:") as archive:
        first = archive.next()
        file = archive.extractfile(first) if first and first.name == OPTIONS else None
        return json.loads(file.read()) if file else None
    return None


def recovered(part: Path, options: dict[str, Any]) -> Begun:
    """What is left of an interrupted call.

    Raises:
        UserError: it is another's.
    """
    index = Index([], [], [])
    if not part.exists():
        return Begun(0, 0, index)
    there = begun(part)
    if there is None and part.stat().st_size < 2 * BLOCK:
        return Begun(0, 0, index)  # killed before the first member was whole
    if there != options:
        raise UserError(
            f"{str(part)!r} is the beginning of another pack, or of other images; choose another --out, or --overwrite"
        )
    done, end, size = -1, 0, part.stat().st_size
    with suppress(tarfile.TarError), tarfile.open(part, "r:") as archive:
        for member in archive:
            after = member.offset_data + -(-member.size // BLOCK) * BLOCK
            if after > size or member.name == f"{OWN}index.json":
                break
            done, end = done + 1, after
            if is_image(member.name):
                index.add(member.name, member.offset_data, member.size)
    return Begun(max(0, done), end, index)


def check_room(out: Path, images: Shrunk, there: Begun) -> None:
    """Print how large the file will be, from a sample; raise UserError if there is no room."""
    places = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int).tolist()
    found = [images[place] for place in places]
    sizes = [len(item.data) for item in found if not item.name.startswith(UNREAD)]
    if not sizes:
        first = found[0].data.decode(errors="replace")
        raise UserError(f"none of {len(found)} sampled image files can be read, the first: {first}")
    whole = round(len(images) * (sum(sizes) / len(sizes) + 2 * BLOCK))
    free = shutil.disk_usage(existing(out)).free
    print(
        f"{len(images)} images, about {megabytes(whole)}" + (f"; continuing after {there.done}" if there.done else "")
    )
    if whole - there.end > free:
        raise UserError(
            f"--out {str(out)!r} needs about {megabytes(whole - there.end)}, {megabytes(free)} are free; make room, choose another "
            "place, or a smaller --size or --quality"
        )


def write(part: Path, images: Shrunk, options: dict[str, Any], there: Begun, console: Console) -> None:
    """Fill the file from where it ends, then add the index, which grows with it."""
    index = there.images
    with open(part, "r+b" if there.end else "wb") as file:
        if there.end:
            file.truncate(there.end)
            file.seek(there.end)
        else:
            add(file, OPTIONS, json.dumps(options).encode())
        for number, item in enumerate(packed(images, there.done, console), start=1):
            start = add(file, item.name, item.data)
            if is_image(item.name):
                index.add(item.name, start, len(item.data))
            if number % FLUSH == 0:
                file.flush()
        if not index.names:
            raise nothing_readable(len(images), Bad(images.source.where(0), "see the others"))
        table = json.dumps(index._asdict()).encode()
        room = -(-len(table) // BLOCK) * BLOCK
        header = len(member_header(f"{OWN}index.json", room + BLOCK))
        begins = file.tell() + header
        last = MAGIC + f"{begins} {len(table)}\n".encode()
        add(file, f"{OWN}index.json", table.ljust(room, b" ") + last.ljust(BLOCK, b" "))
        file.write(bytes(2 * BLOCK))  # the end of a tar file
        file.flush()
        os.fsync(file.fileno())


def packed(images: Shrunk, done: int, console: Console) -> Iterator[Packed]:
    """The rest of the images, in order."""
    order = [[place] for place in range(done, len(images))]
    feed = loader(images, order, resolve_workers(images.config.workers), CPU, list)
    for batch in track(feed, f"packing {len(images)} images", len(order), console):
        for item in batch:
            if item.name.startswith(UNREAD):
                say_once(f"skipped: {item.data.decode(errors='replace')}")
            yield item


def member_header(name: str, size: int) -> bytes:
    """The blocks before a member's bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def add(file: BinaryIO, name: str, data: bytes) -> int:
    """Add a member; where its bytes begin."""
    file.write(member_header(name, len(data)))
    start = file.tell()
    file.write(data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0"))
    return start
