"""A run's weights for other libraries: ``timm`` is the model alone, with a model card, ``onnx`` its graph, ``transformers`` encoder
and decoder.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import nn

from leanmim.classifier.model import build_classifier
from leanmim.config import Export, Pretrain
from leanmim.errors import CannotWrite, UserError
from leanmim.formats.card import Card, check_license
from leanmim.formats.onnx_format import onnx_classifier, onnx_encoder, onnx_loading
from leanmim.formats.timm_format import timm_classifier, timm_files, timm_lines, timm_loading
from leanmim.formats.vitmae import vitmae_files, vitmae_loading
from leanmim.mim import MIM
from leanmim.progress import console_of
from leanmim.run import Run, load, run_of, write_atomically, write_json
from leanmim.start import Start, checkpoint_of, open_start
from leanmim.weights import digest, rebuild

__all__ = ["FORMATS", "Format", "export", "timm_files", "timm_lines", "vitmae_files", "write_export"]

Files = dict[str, Any]  # tensors by their names for NAME.safetensors, bytes for others, JSON values for NAME.json


class Format(NamedTuple):
    """A row of the table of formats: what it makes of each kind of run."""

    encoder: Callable[
        [Pretrain, MIM, dict[str, Any], int | None], Files
    ]  # of a configuration, model, checkpoint, depth
    classifier: Callable[[Start, nn.Module, dict[str, Any]], Files] | None  # of a fine-tuned run and its checkpoint
    shallow: bool  # whether it can hold the first blocks or stages of a model
    loading: Callable[[Path, bool], str]  # of a folder, and whether it holds a classifier: Python that loads it
    card: bool = False  # whether a model card belongs to it


FORMATS = {
    "timm": Format(timm_files, timm_classifier, True, timm_loading, card=True),
    "onnx": Format(onnx_encoder, onnx_classifier, True, onnx_loading),
    "transformers": Format(vitmae_files, None, False, vitmae_loading),
}
"""By the name that --format gives."""


def export(config: Export) -> Path:
    """Write a run's weights in another library's format, and say on the standard error how they are loaded.

    Returns:
        The folder; with ``all_depths`` the one that holds a folder for each depth.

    Raises:
        UserError: as for `write_export`.
    """
    folders, classifier = write_export(config)
    console_of(stderr=True).print(f"To load it in Python:\n{FORMATS[config.format].loading(folders[-1], classifier)}")
    if not config.all_depths:
        return folders[0]
    return Path(config.out) if config.out else home(config)


def write_export(config: Export, repo: str | None = None) -> tuple[list[Path], bool]:
    """Write a run's weights in another library's format; for timm also a model card.

    Args:
        config: of the command.
        repo: OWNER/NAME on the Hugging Face hub, for the card; None is not known yet.

    Returns:
        The folder of each depth, and whether they hold a classifier.

    Raises:
        UserError: the run cannot be read, the format cannot hold this model, no segment ends at the depth, or files
            would be overwritten.
    """
    config.check()
    if config.all_depths and config.depth is not None:
        raise UserError("--depth and --all-depths: give one of them")
    check_license(config.license)
    if config.license and not FORMATS[config.format].card:
        raise UserError(
            f"--license is for the model card, which --format {config.format} has none of; use --format timm"
        )
    path = Path(config.run)
    found = checkpoint_of(path)
    state = load(found) if found else Run(path).read()
    if "classes" in state:
        return [export_classifier(config, state, repo)], True
    return export_encoder(config, state, repo), False


def export_classifier(config: Export, state: dict[str, Any], repo: str | None) -> Path:
    """Write the classifier of a fine-tuned run. As `write_export`."""
    make = FORMATS[config.format].classifier
    if make is None:
        able = " or ".join(name for name, row in FORMATS.items() if row.classifier)
        raise UserError(f"--format {config.format} takes no fine-tuned run; use --format {able}")
    if config.all_depths or config.depth is not None:
        option = "--all-depths" if config.all_depths else "--depth"
        raise UserError(f"{option}: a fine-tuned run is written as a whole; give --depth to `leanmim finetune`")
    folder = folder_of(config, None)
    start = open_start(config.run)
    files = make(start, build_classifier(start), state)
    write(folder, files | card(config, state, files, repo))
    return folder


def export_encoder(config: Export, state: dict[str, Any], repo: str | None) -> list[Path]:
    """Write the encoder of a pre-training run. As `write_export`."""
    trained, model = rebuild(state, config.run)
    target, whole = FORMATS[config.format], model.encoder.depths[-1]
    depths = model.encoder.depths if config.all_depths else (config.depth,)
    if not target.shallow and not {*depths} <= {None, whole}:
        option = "--all-depths" if config.all_depths else "--depth"
        raise UserError(f"{option}: --format {config.format} writes whole models; use --format timm")
    folders = [folder_of(config, depth) for depth in depths]  # checked before anything is written
    for folder, depth in zip(folders, depths, strict=True):
        files = target.encoder(trained, model, state, depth)
        if files["config.json"].get("leanmim", {}).get("not_pretrained"):
            short = f"--depth {trained.depth}" if trained.depth else f"timm does not build {trained.model} shorter"
            print(
                f"{short}: {folder} holds the whole model, its later layers untrained (not_pretrained in config.json)",
                file=sys.stderr,
            )
        write(folder, files | card(config, state, files, repo, depth=depth or whole, whole=whole))
    return folders


def card(config: Export, state: dict[str, Any], files: Files, repo: str | None, **depths: int) -> Files:
    """The model card of these files, where the format has one."""
    if not FORMATS[config.format].card:
        return {}
    parameters = sum(tensor.numel() for tensor in files["model.safetensors"].values())
    own = Card(run_of(Path(config.run)), state, files["config.json"], parameters, config.license, repo, **depths)
    return {"README.md": str(own).encode()}


def home(config: Export) -> Path:
    """The folder of a run's exports."""
    return run_of(Path(config.run)).folder / "export"


def folder_of(config: Export, depth: int | None) -> Path:
    """Where the files of a model go, of its whole depth or of the first ``depth`` blocks or stages.

    Raises:
        UserError: it holds files that the user did not ask to overwrite, or is a file.
    """
    if config.out:
        folder = Path(config.out) / f"depth{depth}" if config.all_depths else Path(config.out)
        if not config.overwrite and folder.is_dir() and any(file.suffix != ".part" for file in folder.iterdir()):
            raise UserError(f"{str(folder)!r} is not empty; choose another --out, or --overwrite")
    else:
        folder = home(config) / (config.format if depth is None else f"{config.format}-depth{depth}")
    if folder.is_file():
        raise UserError(f"{str(folder)!r} is a file; --out takes a folder")
    return folder


def write(folder: Path, files: Files) -> None:
    """Write each file atomically: tensors as safetensors, bytes as they are, anything else as JSON.

    Raises:
        CannotWrite: of the disk.
    """
    try:
        for name, content in files.items():
            write_file(folder / name, content)
    except CannotWrite as error:
        raise CannotWrite(f"{error}; or export to another place with --out FOLDER") from error


def write_file(path: Path, content: Any) -> None:
    """One of them."""
    if path.suffix == ".safetensors":
        tensors = {key: value.detach().contiguous().clone() for key, value in sorted(content.items())}
        metadata = {"format": "pt", "leanmim_digest": digest(tensors)}  # `read_weights` compares it
        write_atomically(path, partial(Path.write_bytes, data=save(tensors, metadata)))
    elif isinstance(content, bytes):
        write_atomically(path, partial(Path.write_bytes, data=content))
    else:
        write_json(path, content)
