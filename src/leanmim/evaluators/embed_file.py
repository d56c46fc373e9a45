"""A file of features that is written in parts, and continued after a kill.

A part holds whole batches and is written when it is complete. At the end the parts are put together, one after the other:
neither the memory nor the finished file shows how many images there are, or that the command was killed.

b batch, p patches, d width.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanmim.config.embed import Embed
from leanmim.data import Bad, Source
from leanmim.data.source import nothing_readable
from leanmim.errors import CannotWrite, UserError
from leanmim.names import one_line
from leanmim.run import write_atomically, write_json

PART_IMAGES, PART_BYTES = 2048, 2**26
"""What a part holds at most; one batch at least."""


class Rows(NamedTuple):
    """The features of a batch."""

    x: Tensor | None  # b d or b p d, on the CPU; None if no image could be read
    places: list[int]  # of their images in the data
    bad: list[Bad]


@dataclass(frozen=True)
class Parts:
    """The parts of a file, and the file itself when it is complete.

    Args:
        config: with absolute paths as data.
        source: the images.
        shape: of the features of one image.
        identity: JSON values; another file's differ.
    """

    config: Embed
    source: Source
    shape: tuple[int, ...]
    identity: dict[str, Any]

    @property
    def out(self) -> Path:
        """The file."""
        return Path(self.config.out)

    def beside(self, suffix: str) -> Path:
        """The file's name and a suffix."""
        return self.out.with_name(self.out.name + suffix)

    @property
    def folder(self) -> Path:
        """Of the parts."""
        return self.beside(".parts")

    def part(self, index: int) -> Path:
        """The file of a part."""
        return self.folder / f"{index:06d}.npz"

    @cached_property
    def batches(self) -> int:
        """Batches of a part. They follow from the configuration, as do the row groups of a Parquet file."""
        images = min(PART_IMAGES, PART_BYTES // (prod(self.shape) * np.dtype(self.config.dtype).itemsize))
        return max(1, images // self.config.batch_size)

    @property
    def count(self) -> int:
        """How many parts there will be."""
        return ceil(len(self.source) / (self.batches * self.config.batch_size))

    @property
    def done(self) -> int:
        """How many parts there are; they are written in order."""
        return next((i for i in range(self.count) if not self.part(i).is_file()), self.count)

    def finished(self) -> bool:
        """Whether the file is there, and complete.

        Raises:
            UserError: it, or an unfinished one, is another's, and may not be overwritten.
        """
        if self.out.is_dir():
            raise UserError(f"--out {str(self.out)!r} is a folder; give the name of a file")
        if self.config.overwrite:
            return False
        names = self.out.with_suffix(".txt")
        for own in (self.out, *((names,) if self.out.suffix == ".npy" else ())):
            if own.exists() and not self.beside(".json").is_file():
                raise UserError(f"{str(own)!r} is not of `leanmim embed`; choose another --out, or --overwrite")
        if self.out.exists():
            self.check_same(self.beside(".json"))
            shutil.rmtree(self.folder, ignore_errors=True)  # of a command that was killed at its very end
        elif self.folder.exists():
            self.check_same(self.folder / "identity.json")
        return self.out.exists()

    def check_same(self, file: Path) -> None:
        """Raise UserError if the identity in a file is another."""
        try:
            stored = json.loads(file.read_text())
            changes = self.config.changes(stored["config"])
            if stored["weights"] != self.identity["weights"]:
                changes.append(f"other weights: of {stored['start']} there, of {self.identity['start']} now")
            if stored["names"] != self.identity["names"]:
                changes.append(f"other images: {stored['images']} there, {len(self.source)} now, or of other names")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(file)!r} is damaged ({error!r}); start afresh with --overwrite") from error
        if changes:
            raise UserError(
                "\n  ".join([f"--out {str(self.out)!r} holds features of another configuration:", *changes])
                + "\nChoose another --out, give the same options, or --overwrite to start afresh"
            )

    def prepare(self) -> None:
        """Make room for the parts.

        Raises:
            UserError: nothing can be written there.
        """
        try:
            if self.config.overwrite:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.out.unlink(missing_ok=True)
            write_json(self.folder / "identity.json", self.identity)
        except (OSError, CannotWrite) as error:
            raise UserError(
                f"--out {str(self.out)!r} cannot be written ({error.__cause__ or error}); choose another"
            ) from error

    def save(self, part: int, batches: Iterable[Rows]) -> None:
        """Write one part.

        Raises:
            UserError: a number is not finite.
        """
        x, kept, unreadable = [torch.empty(0, *self.shape)], [], []
        for rows in batches:
            kept += rows.places
            unreadable += [(bad.path, bad.reason) for bad in rows.bad]
            x += [] if rows.x is None else [rows.x]
        features = torch.cat(x).to(getattr(torch, self.config.dtype))
        if not features.isfinite().all():
            row = int((~features.isfinite()).flatten(1).any(1).nonzero()[0])
            remedy = (
                "with --dtype float32 they may be" if self.config.dtype == "float16" else "the weights may be damaged"
            )
            raise UserError(f"the features of {self.source.where(kept[row])} are not finite; {remedy}")

        def write(file: Path) -> None:
            with open(file, "wb") as stream:
                np.savez(
                    stream,
                    x=features.numpy(),
                    kept=np.array(kept, np.int64),
                    unreadable=np.array(unreadable, np.str_).reshape(-1, 2),
                )

        write_atomically(self.part(part), write)

    def rows(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Paths and features of each part."""
        for i in range(self.count):
            with np.load(self.part(i)) as part:
                yield [one_line(self.source.where(place)) for place in part["kept"].tolist()], part["x"]

    def finish(self, write: "Writer") -> None:
        """Put the parts together and remove them.

        Raises:
            UserError: no image could be read.
        """
        skipped, images, listed = [], 0, self.beside(".skipped.jsonl")
        for i in range(self.count):
            with np.load(self.part(i)) as part:
                images += len(part["kept"])
                skipped += [Bad(path, reason) for path, reason in part["unreadable"].tolist()]
        if not images:
            shutil.rmtree(self.folder)
            raise nothing_readable(len(self.source), skipped[0])
        write_skipped(listed, skipped)
        if skipped:
            print(f"{len(skipped)} unreadable images are left out, listed in {listed}", file=sys.stderr)
        write_json(self.beside(".json"), self.identity | {"shape": [images, *self.shape]})
        write(self, images)
        shutil.rmtree(self.folder)


def write_skipped(path: Path, bad: list[Bad]) -> None:
    """List unreadable files, one JSON object a line; without any, remove the list of an earlier call."""
    if not bad:
        path.unlink(missing_ok=True)
        return
    text = "".join(json.dumps({"path": one.path, "reason": one.reason}) + "\n" for one in bad)
    write_atomically(path, lambda file: file.write_text(text))


Writer = Callable[[Parts, int], None]  # of the parts, with so many images


def npy_writer() -> Writer:
    """Writes one array, and a text file of paths."""

    def write(parts: Parts, images: int) -> None:
        def names(file: Path) -> None:
            with open(file, "w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(f"{path}\n" for paths, _ in parts.rows() for path in paths)

        def array(file: Path) -> None:
            descr = np.lib.format.dtype_to_descr(np.dtype(parts.config.dtype))
            header = {"descr": descr, "fortran_order": False, "shape": (images, *parts.shape)}
            with open(file, "wb") as stream:  # not a memory map, whose pages count as memory
                np.lib.format.write_array_header_1_0(stream, header)
                for _, x in parts.rows():
                    x.tofile(stream)

        write_atomically(parts.out.with_suffix(".txt"), names)
        write_atomically(parts.out, array)

    return write


def parquet_writer() -> Writer:
    """Writes a table of paths and embeddings, a row group for each part.

    Raises:
        UserError: pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('--out FILE.parquet needs pyarrow: pip install "leanmim[parquet]"; or give .npy') from error

    def write(parts: Parts, images: int) -> None:
        kind = pa.from_numpy_dtype(np.dtype(parts.config.dtype))
        for width in reversed(parts.shape):
            kind = pa.list_(kind, width)
        schema = pa.schema([("path", pa.string()), ("embedding", kind)])

        def table(file: Path) -> None:
            with parquet.ParquetWriter(file, schema) as stream:
                for paths, x in parts.rows():
                    column = pa.array(x.ravel())
                    for width in reversed(parts.shape):
                        column = pa.FixedSizeListArray.from_arrays(column, width)
                    stream.write_table(pa.table([pa.array(paths, pa.string()), column], schema=schema))

        write_atomically(parts.out, table)

    return write


WRITERS: dict[str, Callable[[], Writer]] = {".npy": npy_writer, ".parquet": parquet_writer}
"""By the suffix of --out."""
