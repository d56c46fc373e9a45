"""The shares of a checkpoint: what processes share out is written by all of them, in torch's distributed format.

    checkpoints/last.pt          step, configuration, ...; it names the folder, and holds the checksums of its files
    checkpoints/step-120.shards  weights and moments (torch.distributed.checkpoint): a file of each process, and .metadata

A folder is complete before a checkpoint names it, and none that is named is written to: whoever is killed meanwhile leaves
the last good checkpoint as it was. Any number of processes reads it, also one: `leanmim.checkpoint.load` does.

.metadata is a pickle. It is read by an unpickler that knows what belongs there, so that it cannot run anything.
"""

import errno
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from leanmim.errors import CannotWrite, UserError
from leanmim.files import cannot_write
from leanmim.processes import Process

SUFFIX = ".shards"
CHUNK = 2**24  # bytes that are read at a time
DESCRIPTIONS = {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"}
KNOWN = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


def named(state: dict[str, Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """The weights and moments of a checkpoint by the names that they have in a folder, each with the dictionary that holds it and
    its key there.
    """
    for key in state.get("model", {}):
        yield f"model.{key}", state["model"], key
    for i, optimizer in enumerate(state.get("optimizers", [])):
        for parameter, moments in optimizer["state"].items():
            for key in moments:
                yield f"optimizers.{i}.{parameter}.{key}", moments, key


def write(checkpoints: Path, state: dict[str, Any], process: Process) -> dict[str, Any]:
    """Write what is shared out into a new folder; all processes must call this. Where nothing is, nothing is done.

    Returns:
        The state without it, and the name of the folder.

    Raises:
        UserError: a weight is not finite.
        CannotWrite: of the disk. Both in all processes.
    """
    if not any(isinstance(held[key], DTensor) for _, held, key in named(state)):
        return state
    state = state | {
        "model": {**state["model"]},
        "optimizers": [own | {"state": {key: {**moments} for key, moments in own["state"].items()}}
                       for own in state["optimizers"]],
    }  # fmt: skip
    shares = {name: held.pop(key) for name, held, key in [*named(state)] if isinstance(held[key], DTensor)}
    wrong = next((name for name, share in shares.items() if not share.to_local().isfinite().all()), "")
    if found := next(filter(None, process.gather(wrong)), ""):
        raise UserError(f"{found} is not finite: nothing is written, and the last checkpoint stays as it is")
    folder = checkpoints / process.gather(unused(checkpoints, state["step"]))[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of itself
            dcp.save(shares, checkpoint_id=folder)
    except CheckpointException as error:
        if process.first:
            shutil.rmtree(folder, ignore_errors=True)
        reason, _ = next(iter(error.failures.values()))
        raise not_written(folder, reason) from error
    own = [*folder.glob(f"__{process.rank}_*"), *(folder.glob(".metadata") if process.first else ())]
    files = {name: value for part in process.gather({file.name: checksum(file) for file in own})
             for name, value in part.items()}  # fmt: skip
    return state | {"shards": {"folder": folder.name, "files": files}}


def unused(checkpoints: Path, step: int) -> str:
    """A name for the folder of a step, which no folder has."""
    names = (f"step-{step}{f'-{number}' * (number > 0)}{SUFFIX}" for number in count())
    return next(name for name in names if not (checkpoints / name).exists())


def not_written(folder: Path, reason: BaseException) -> CannotWrite:
    """What to tell of a folder that could not be written."""
    return cannot_write(folder, reason if isinstance(reason, OSError) else OSError(errno.EIO, str(reason)))


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(file, "rb") as stream:
        while part := stream.read(CHUNK):
            value = zlib.crc32(part, value)
    return value


class Known(pickle.Unpickler):
    """Unpickles what .metadata holds, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What it may name: torch's descriptions of tensors and files, types, and paths, which are only told."""
        if (module, name) in KNOWN:
            return super().find_class(module, name)
        own = super().find_class(module, name) if module in DESCRIPTIONS else None
        if isinstance(own, type) and own.__module__ == module:  # and not what is imported there
            return own
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePosixPath
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


class Reader(dcp.FileSystemReader):
    """Reads a folder without running what it holds."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What the folder holds, and where."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = Known(file).load()
        metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return metadata


def join(checkpoints: Path, state: dict[str, Any]) -> None:
    """Put what a folder holds back into the state that names it, whole and on the CPU.

    Raises:
        Exception: of any kind, where it is missing or damaged.
    """
    written = state.pop("shards")
    folder = checkpoints / Path(written["folder"]).name
    files = {folder / Path(name).name: value for name, value in written["files"].items()}
    for file, value in files.items():
        if checksum(file) != value:
            raise ValueError(f"the checksum of {folder.name}/{file.name} is wrong")
    reader = Reader(folder)
    held = reader.read_metadata().state_dict_metadata
    known = {name: part for name, part in held.items() if isinstance(part, TensorStorageMetadata)}
    claimed = sum(prod(part.size) * part.properties.dtype.itemsize for part in known.values())
    if claimed > sum(file.stat().st_size for file in files):
        raise ValueError(f"{folder.name} claims to hold more than it does")
    tensors = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in known.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is one process
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # which is no Exception
        raise ValueError(str(next(iter(error.failures.values()))[0])) from error
    put_back(state, tensors)


def put_back(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The opposite of `named`."""
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            state["model"][rest] = value
        else:
            i, parameter, key = rest.split(".")
            state["optimizers"][int(i)]["state"].setdefault(int(parameter), {})[key] = value


def sweep(checkpoints: Path, kept: Sequence[Path]) -> None:
    """Remove the folders that no checkpoint names: older ones, and those of a writer that was killed.

    Args:
        checkpoints: where they are.
        kept: all checkpoints there; where one of them is damaged, nothing is removed.
    """
    if not (folders := [*checkpoints.glob(f"*{SUFFIX}")]):
        return
    try:
        names = {named_by(file) for file in kept}
    except Exception:  # torch raises many kinds for damaged files
        return
    for folder in folders:
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)


def named_by(file: Path) -> str:
    """The folder that a checkpoint names; empty if none. The weights that it holds are not read."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return state.get("shards", {}).get("folder", "")
