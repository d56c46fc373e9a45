"""A run's weights for other libraries: ``timm`` is the backbone alone, ``transformers`` encoder and decoder."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from leanmim.config import Export, Pretrain
from leanmim.errors import UserError
from leanmim.formats.timm_format import timm_files, timm_lines
from leanmim.formats.vitmae import vitmae_files
from leanmim.mim import MIM
from leanmim.run import write_atomically, write_json
from leanmim.weights import restore

__all__ = ["FORMATS", "Format", "export", "timm_files", "timm_lines", "vitmae_files"]

Files = dict[str, dict[str, Any]]  # tensors by their names for NAME.safetensors, JSON values for NAME.json


class Format(NamedTuple):
    """A row of the table of formats."""

    files: Callable[[Pretrain, MIM, dict[str, Any], int | None], Files]  # of a configuration, model, checkpoint, depth
    shallow: bool  # whether it can hold the first blocks or stages of a model


FORMATS = {"timm": Format(timm_files, True), "transformers": Format(vitmae_files, False)}
"""By the name that --format gives."""


def export(config: Export) -> Path:
    """Write a run's weights in another library's format.

    Returns:
        The folder; with ``all_depths`` the one that holds a folder for each depth.

    Raises:
        UserError: the run cannot be read, the format cannot hold this model, no segment ends at the depth, or files
            would be overwritten.
    """
    if config.all_depths and config.depth is not None:
        raise UserError("--depth and --all-depths: give one of them")
    trained, model, state = restore(config.run)
    target, whole = FORMATS[config.format], model.encoder.depths[-1]
    depths = model.encoder.depths if config.all_depths else (config.depth,)
    if not target.shallow and not {*depths} <= {None, whole}:
        option = "--all-depths" if config.all_depths else "--depth"
        raise UserError(f"{option}: --format {config.format} writes whole models; use --format timm")
    folders = [folder_of(config, depth) for depth in depths]  # checked before anything is written
    for folder, depth in zip(folders, depths, strict=True):
        files = target.files(trained, model, state, depth)
        if files["config.json"].get("leanmim", {}).get("not_pretrained"):
            short = f"--depth {trained.depth}" if trained.depth else f"timm does not build {trained.model} shorter"
            print(
                f"{short}: {folder} holds the whole model, its later layers untrained (not_pretrained in config.json)",
                file=sys.stderr,
            )
        write(folder, files)
    if not config.all_depths:
        return folders[0]
    return Path(config.out) if config.out else Path(config.run) / "export"


def folder_of(config: Export, depth: int | None) -> Path:
    """Where the files of a model go, of its whole depth or of the first ``depth`` blocks or stages.

    Raises:
        UserError: it holds files that the user did not ask to overwrite, or is a file.
    """
    if config.out:
        folder = Path(config.out) / f"depth{depth}" if config.all_depths else Path(config.out)
        if not config.overwrite and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{str(folder)!r} is not empty; choose another --out, or --overwrite")
    else:
        folder = Path(config.run) / "export" / (config.format if depth is None else f"{config.format}-depth{depth}")
    if folder.is_file():
        raise UserError(f"{str(folder)!r} is a file; --out takes a folder")
    return folder


def write(folder: Path, files: Files) -> None:
    """Write each file atomically: tensors as safetensors, anything else as JSON."""
    for name, content in files.items():
        if name.endswith(".safetensors"):
            tensors = {key: value.detach().contiguous().clone() for key, value in content.items()}
            write_atomically(folder / name, partial(save_file, tensors, metadata={"format": "pt"}))
        else:
            write_json(folder / name, content)
