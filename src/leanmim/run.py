"""The run folder and what it holds: checkpoints written atomically, read with ``weights_only=True``.

A checkpoint is ``{format, config, step, ...}`` and what the command adds; for pre-training ``{phase, mean, std, model,
optimizers}``. There is no generator state to save: every step seeds its own randomness from (seed, process, step).
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanmim.config import Config
from leanmim.errors import UserError

FORMAT = "leanmim-2"
EARLIER = "leanmim-1"  # of version 0.1.0; the same but for names


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, flush it to disk, then rename it; if it fails, remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of leanmim onto the CPU.

    Raises:
        UserError: it is missing, damaged, or not leanmim's.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {str(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(
            f"{str(path)!r} is damaged or not a checkpoint ({type(error).__name__}: {error}); "
            "put a good copy in its place, or train again"
        ) from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, EARLIER):
        raise UserError(f"{str(path)!r} is a checkpoint, but not one of leanmim ({FORMAT})")
    if "stage" in state:
        state["phase"] = state.pop("stage")
    return state


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.folder / "config.json"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """Of a fine-tuning: the weights with the highest accuracy so far."""
        return self.folder / "checkpoints" / "best.pt"

    @property
    def labels(self) -> Path:
        """Of a fine-tuning: the classes and the images that were chosen."""
        return self.folder / "labels.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object a line: what `leanmim evaluate`, `knn` and `probe` found."""
        return self.folder / "evaluations.jsonl"

    @property
    def cost(self) -> Path:
        """Predicted cost, and at the end what was measured."""
        return self.folder / "cost.json"

    @property
    def names(self) -> Path:
        """What each image of the data is called, in order: a JSON list."""
        return self.folder / "names.json"

    @property
    def skipped(self) -> Path:
        """The unreadable files, one JSON object a line."""
        return self.folder / "skipped.jsonl"

    def save(self, state: dict[str, Any]) -> None:
        """Write the newest checkpoint."""
        save(self.last, state)

    def read(self) -> dict[str, Any]:
        """The newest checkpoint.

        Raises:
            UserError: this is not a run folder, or its checkpoint is missing or damaged.
        """
        if not self.config.is_file():
            raise UserError(f"{str(self.folder)!r} is not a run folder of `leanmim pretrain`: it has no config.json")
        if not self.last.is_file():
            raise UserError(f"{str(self.folder)!r} has no checkpoint yet; let the run go on")
        return load(self.last)

    def stored(self) -> dict[str, Any]:
        """The configuration in the folder, empty if there is none that can be read; `to_resume` says what is wrong."""
        try:
            stored = json.loads(self.config.read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def to_resume(self, config: Config, overwrite: bool = False) -> dict[str, Any] | None:
        """The checkpoint to continue from, or None to start afresh. Nothing is written.

        Args:
            config: of the command; a stored one may differ in its ``FREE`` fields only.
            overwrite: start afresh, whatever run the folder holds.

        Raises:
            UserError: the folder holds another run, or something else, and may not be replaced.
        """
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return None
        if not self.folder.is_dir():
            raise UserError(f"--out {str(self.folder)!r} is a file; give a folder")
        stored = self.stored()
        if not stored.keys() & config.to_json().keys():
            raise UserError(f"--out {str(self.folder)!r} is not empty and not a run of leanmim; choose another folder")
        if overwrite:
            return None
        if changes := config.changes(stored):
            raise UserError(
                "\n  ".join([f"--out {str(self.folder)!r} holds a run of another configuration:", *changes])
                + "\nChoose another --out, give the same options to continue it, or --overwrite to start afresh"
            )
        try:
            return load(self.last) if self.last.exists() else None
        except UserError as error:
            raise UserError(f"cannot continue: {error}; or start afresh with --overwrite") from error

    def check_names(self, names: Sequence[str]) -> None:
        """Raise UserError if images were added to the data or removed since the run began: the order would be another."""
        if not self.names.is_file():
            return  # a run of version 0.1.0 has no such list
        before, now = json.loads(self.names.read_text()), list(names)
        if before == now:
            return
        added, removed = sorted(set(now) - set(before)), sorted(set(before) - set(now))
        lines = [
            f"{len(found)} {what}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
            for what, found in (("added", added), ("removed", removed))
            if found
        ]
        raise UserError(
            "the images in --data are not those that the run began with:\n  "
            + "\n  ".join(lines or ["the same names in another order"])
            + "\nPut them back, or start afresh in another --out (or with --overwrite)"
        )

    def write_names(self, names: Sequence[str]) -> None:
        """Keep what the images are called, for `check_names`."""
        if not self.names.is_file():
            write_atomically(self.names, lambda file: file.write_text(json.dumps(list(names))))

    def read_labels(self) -> dict[str, Any]:
        """What `labels` holds.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            return json.loads(self.labels.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{str(self.labels)!r} cannot be read ({error}); put it back, or start afresh with --overwrite"
            ) from error

    def prepare(self, config: Config, step: int) -> None:
        """Make the folder ready to continue after ``step`` steps; 0 starts afresh.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {str(self.folder)!r} cannot be made ({error}); choose another folder") from error
        if step == 0:  # of an earlier run only what leanmim wrote is removed
            for name in ("checkpoints", "tensorboard", "export", "probe", "cache"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("environment.json", "cost.json", "report.html", "labels.json", "results.json", "predictions.csv",
                         "confusion.png", "mistakes.png"):  # fmt: skip
                (self.folder / name).unlink(missing_ok=True)
            pictures = (self.folder / "reconstructions.png", *self.folder.glob("reconstructions-segment*.png"))
            for path in (*pictures, self.metrics, self.evaluations, self.skipped, self.names):
                path.unlink(missing_ok=True)
        write_json(self.config, config.to_json())
        if self.metrics.exists():  # lines written after the checkpoint will be written again
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomically(self.metrics, lambda file: file.write_text("".join(line + "\n" for line in kept)))
