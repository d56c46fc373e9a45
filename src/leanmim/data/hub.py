"""Image datasets of Hugging Face's library `datasets`: folders that it saved, and Parquet files as the hub keeps them.

The library opens them. It maps Arrow files into memory; Parquet files cannot be read at random, so it first copies them into
such ones, once, in its own cache.
"""

import os
import re
from collections.abc import Iterator
from glob import escape, glob
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from leanmim.data.find import SUFFIXES
from leanmim.data.read import Choose, Cut, Picture, read_cut, read_image
from leanmim.data.shards import Shards
from leanmim.data.source import is_pattern
from leanmim.errors import UserError
from leanmim.files import REMEDIES, cannot_write

PARQUET = ".parquet"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
"""How names of shards begin: the split, the shard's number, how many there are."""
SPLITS = {"train", "validation", "test"}
"""How the hub calls them."""


class Hub(Shards):
    """The images of a dataset, split after split; they are called SPLIT/CLASS/ROW, as far as there are splits and classes.

    Args:
        root: folder, file or pattern.
        splits: by name; an empty name is that of the only one.
        channels: as for `read_image`.

    Raises:
        UserError: there is no column of images, or several.
    """

    def __init__(self, root: str, splits: dict[str, Any], channels: int) -> None:
        library = import_datasets()
        features = next(iter(splits.values())).features
        self.columns = list(features)
        self.image = image_column(root, features)
        labels = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
        self.label = only(labels, ("label", "labels"))
        undecoded = library.Image(decode=False)
        self.rows = library.concatenate_datasets(
            [
                part.with_format(None).select_columns([self.image]).cast_column(self.image, undecoded)
                for part in splits.values()
            ]
        )
        names = (name for split, part in splits.items() for name in row_names(split, part, self.label))
        paths = [file["filename"] for file in self.rows.cache_files]
        super().__init__(root, paths, names, np.arange(len(self.rows)), channels)

    @property
    def sizes(self) -> list[int | None]:
        """Bytes of every image; None where the dataset holds a path only."""
        from pyarrow import compute

        stored = compute.struct_field(self.rows.data.column(self.image), "bytes")
        return compute.binary_length(stored).take(self.places).to_pylist()

    def where(self, index: int) -> str:
        """Dataset and name."""
        return f"{self.root}: {self._names[index]}"

    def read(self, index: int) -> Picture:
        """A row's picture.

        Raises:
            UNREADABLE: it is broken, or there is none.
        """
        name, data = self.stored(index)
        return read_image(name, self.channels, data)

    def cut(self, index: int, choose: Choose, size: tuple[int, int]) -> Cut:
        """A row's picture for the sake of a box in it, see `read_cut`. Errors as for `read`."""
        name, data = self.stored(index)
        return read_cut(name, self.channels, choose, size, data)

    def stored(self, index: int) -> tuple[str, bytes | None]:
        """The path of a file and what it holds; None if that is to be read there."""
        row = self.rows[int(self.places[index])][self.image] or {"bytes": None, "path": None}
        if row["bytes"] is None and not row["path"]:
            raise OSError("the row holds no image")
        return row["path"] or self._names[index], row["bytes"]


def import_datasets() -> ModuleType:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            'Parquet files and saved datasets of Hugging Face need its library datasets: pip install "leanmim[hub]"'
        ) from error
    return datasets


def image_column(root: str, features: dict[str, Any]) -> str:
    """The column of images: of the library's type, or of a file's bytes and path, as that is stored.

    Raises:
        UserError: there is none, or several of which none is called image.
    """
    found = [
        name
        for name, kind in features.items()
        if isinstance(kind, import_datasets().Image) or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"})
    ]
    column = only(found, ("image", "img"))
    if column is None:
        which = f"several columns of images ({', '.join(found)}), and" if found else "no column of images;"
        raise UserError(
            f"{root!r} has {which} the columns {', '.join(features)}; call one 'image' (Dataset.rename_column), of the type "
            "datasets.Image (Dataset.cast_column), and save it with save_to_disk"
        )
    return column


def only(names: list[str], usual: tuple[str, ...]) -> str | None:
    """The only name, or the only one that is among the usual ones."""
    chosen = names if len(names) == 1 else [name for name in names if name in usual]
    return chosen[0] if len(chosen) == 1 else None


def row_names(split: str, part: Any, label: str | None) -> Iterator[str]:
    """What the images of a split are called; one without label, which is -1 in the hub's test splits, has no class. The split
    validation is called as in a labelled folder.
    """
    above = f"{'val' if split == 'validation' else split}/" if split else ""
    if label is None:
        yield from (f"{above}{row:08d}" for row in range(len(part)))
        return
    classes = [f"{name.replace('/', '_')}/" for name in part.features[label].names]
    for row, number in enumerate(part.data.column(label).to_pylist()):
        yield f"{above}{'' if number in (None, -1) else classes[number]}{row:08d}"


def open_hub(data: str, channels: int) -> Hub | None:
    """The source of a folder that `datasets` saved, of a Parquet file, of those in a folder or that match a pattern; None if
    --data names something else.

    Raises:
        UserError: `datasets` is not installed, a file is missing or broken, or there is no column of images.
        CannotWrite: there is no room for the library's copy of Parquet files.
    """
    files = parquet_files(data)
    if not files and not is_saved(data):
        return None
    library = import_datasets()
    try:
        splits = read_parquet(files) if files else library.load_from_disk(data)
        return Hub(data, splits if isinstance(splits, dict) else {"": splits}, channels)
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its parts do
        cause = error.__cause__ or error
        if files and isinstance(cause, OSError) and cause.errno in REMEDIES and cause.filename not in files:
            raise cannot_write(Path(library.config.HF_DATASETS_CACHE), cause) from error
        broken = first_broken(files or sorted(glob(f"{escape(data)}/**/*.arrow", recursive=True)))
        raise UserError(
            f"{data!r} cannot be read as a dataset: {broken or error}; write or download it again"
        ) from error


def is_saved(folder: str) -> bool:
    """Whether the library saved a dataset there, or one of several splits."""
    there = {
        name
        for name in ("dataset_info.json", "state.json", "dataset_dict.json")
        if os.path.isfile(os.path.join(folder, name))
    }
    return "dataset_dict.json" in there or len(there) == 2


def parquet_files(data: str) -> list[str]:
    """The Parquet files that --data names; empty if it names something else.

    Those of a folder count where neither images nor folders lie beside them; in a folder that has only the folder ``data``, as a
    repository of the hub, those in that one.

    Raises:
        UserError: some of a folder's shards are missing.
    """
    if not os.path.isdir(data):
        found = sorted(glob(data, recursive=True)) if is_pattern(data) and not os.path.exists(data) else [data]
        return found if all(name.endswith(PARQUET) and os.path.isfile(name) for name in found) else []
    try:
        with os.scandir(data) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:  # who lists it as a folder of images says so
        return []
    if any(os.path.splitext(entry.name)[1].lower() in SUFFIXES for entry in visible):
        return []
    folders = [entry.name for entry in visible if entry.is_dir()]
    files = [entry.path for entry in visible if entry.name.endswith(PARQUET)]
    if folders == ["data"] and not files:
        return parquet_files(os.path.join(data, "data"))
    if folders:
        return []
    check_complete(files)
    return sorted(files)


def check_complete(files: list[str]) -> None:
    """Raise UserError if shards are missing, as the names of the others tell."""
    known = [match.groups() for match in map(SHARD.match, files) if match]
    there = {(start, int(number)) for start, number, _ in known}
    for start, total in sorted({(start, int(total)) for start, _, total in known}):
        if missing := [number for number in range(total) if (start, number) not in there]:
            raise UserError(
                f"{len(missing)} of {total} shards are missing, the first: {start}-{missing[0]:05d}-of-{total:05d}{PARQUET}; "
                "download it, or name those that there are by a pattern"
            )


def read_parquet(files: list[str]) -> Any:
    """The dataset of Parquet files; by splits if all their names begin with one of the hub's."""
    stems = [Path(file).stem for file in files]
    splits = [match[1] if (match := SHARD.match(stem)) else stem for stem in stems]
    if not set(splits) <= SPLITS:
        splits = [""] * len(files)
    parts: dict[str, list[str]] = {}
    for split, file in zip(splits, files, strict=True):
        parts.setdefault(split, []).append(escape(file))
    return {split: import_datasets().Dataset.from_parquet(part) for split, part in parts.items()}


def first_broken(files: list[str]) -> str | None:
    """The first file that cannot be read, and why."""
    from pyarrow import parquet

    for file in files:
        try:
            if not file.endswith(PARQUET):
                import_datasets().Dataset.from_file(file)
                continue
            for _ in parquet.ParquetFile(file).iter_batches():
                pass
        except Exception as error:  # as above
            return f"{file} ({error})"
    return None
