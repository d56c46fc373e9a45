"""Checkpoints: written atomically, read with ``weights_only=True``, and looked at in one place.

A checkpoint is ``{format, config, step, ...}`` and what the command adds; for pre-training ``{phase, mean, std, model,
optimizers}``, of which `leanmim.shards` holds what processes share out. There is no generator state to save: every step seeds its own randomness from (seed, process, step).
What `load` returns holds every field that its readers need, of the right type; whoever builds the model compares shapes.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmim import shards
from leanmim.config import Finetune, Pretrain
from leanmim.config.base import Model
from leanmim.errors import Damaged, UserError
from leanmim.files import write_atomically
from leanmim.schedule import phases
from leanmim.version import __version__

FORMAT = "leanmim-2"
EARLIER = "leanmim-1"  # of version 0.1.0; the same but for names
TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int32, torch.int64}
"""Of weights, moments, and what models count."""
REMEDY = "put a good copy in its place, or train again"


# Writing.


def save(path: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint atomically.

    Args:
        path: of the newest one.
        state: what it holds.
        keep: the newest and those before it, as `earlier` names them; at no moment is there none.

    Raises:
        UserError: a weight is not finite.
        CannotWrite: of the disk.
    """
    if name := not_finite(state):
        raise UserError(f"{name} is not finite: nothing is written, and {str(path)!r} stays as it is")
    size = sum(value.numel() * value.element_size() for _, value in named_tensors(state))

    def write(file: Path) -> None:
        with open(file, "wb") as stream:
            try:
                torch.save({"format": FORMAT, **state}, stream)
            except RuntimeError as error:  # as torch tells that the stream could not be written
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    write_atomically(path, write, lambda: shift(path, keep), size)
    shards.sweep(path.parent, all_of(path))


def earlier(path: Path, place: int) -> Path:
    """The checkpoint so many before the newest one, which is 0: last.pt, last-1.pt, last-2.pt, ..."""
    return path.with_stem(f"{path.stem}-{place}") if place else path


def all_of(path: Path) -> list[Path]:
    """The newest checkpoint and those before it, as far as they are there, newest first."""
    there = {int(found[1]): file for file in path.parent.glob(f"{path.stem}*{path.suffix}")
             if (found := re.fullmatch(rf"{re.escape(path.stem)}-([1-9][0-9]{{0,8}})", file.stem))}  # fmt: skip
    return [file for file in (path, *(there[place] for place in sorted(there))) if file.is_file()]


def shift(path: Path, keep: int) -> None:
    """Call each checkpoint as one that is older; the newest keeps its own name too, until another takes it."""
    for place in range(keep - 1, 0, -1):
        newer, older = earlier(path, place - 1), earlier(path, place)
        if not newer.is_file():
            continue
        if place > 1:
            os.replace(newer, older)
            continue
        older.unlink(missing_ok=True)  # a copy, if it was not shifted
        try:
            os.link(newer, older)
        except OSError:  # a file system without hard links: for a moment the newest one is last-1.pt
            os.replace(newer, older)
    for file in all_of(path)[keep:]:
        file.unlink()


# Reading.


def load(path: Path, resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint of leanmim onto the CPU.

    Args:
        path: the file.
        resume: it must hold what training goes on with, too.

    Raises:
        Damaged: it is missing, its checksum is wrong, or it does not hold what it should.
        UserError: it is not leanmim's, of a newer version, or of a configuration that cannot be.
    """
    try:
        state = unpack(path)
        check(state, str(path), resume)
    except Damaged as error:
        older = [] if resume else [file for file in all_of(path) if file != path]
        raise Damaged(f"{error}; or use the one before it, {str(older[0])!r}") if older else error from error.__cause__
    return state


def unpack(path: Path) -> dict[str, Any]:
    """What a checkpoint of leanmim holds, by its checksums as it was written. Errors as for `load`."""
    if not path.is_file():
        raise Damaged(f"there is no checkpoint {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"the checksum of {wrong} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and "shards" in state:
            shards.join(path.parent, state)
    except Exception as error:  # torch and zipfile raise many kinds for damaged files
        raise Damaged(
            f"{str(path)!r} is damaged or not a checkpoint ({type(error).__name__}: {error}); {REMEDY}"
        ) from error
    form = state.get("format") if isinstance(state, dict) else None
    known = re.fullmatch("leanmim-([1-9][0-9]{0,5})", form) if isinstance(form, str) else None
    if not known:
        raise UserError(f"{str(path)!r} is a checkpoint, but not one of leanmim ({FORMAT})")
    if int(known[1]) > int(FORMAT.rpartition("-")[2]):
        raise UserError(
            f"{str(path)!r} is of the format {form}, which leanmim {__version__} does not know ({EARLIER} and {FORMAT}): a newer "
            "version wrote it; install that one"
        )
    if "stage" in state:
        state["phase"] = state.pop("stage")
    return state


def is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint of leanmim by what it holds, not by its name, or perhaps a damaged one: `load` says so."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(re.search(rb"format.{1,9}leanmim-\d", archive.read(name), re.DOTALL) for name in pickles)
    except Exception:  # zipfile raises many kinds for damaged files
        return True


# What a checkpoint must hold.


def whole(value: Any) -> bool:
    """A count of anything."""
    return type(value) is int and 0 <= value < 2**53


def number(value: Any) -> bool:
    """A number of moderate size."""
    return type(value) in (int, float) and -1e30 < value < 1e30


def numbers(value: Any) -> bool:
    """A list of them."""
    return isinstance(value, list) and all(map(number, value))


def pair(value: Any) -> bool:
    """Two of them."""
    return numbers(value) and len(value) == 2


def names(value: Any) -> bool:
    """A list of different texts."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and 0 < len(value) == len({*value})


def plain(value: Any) -> bool:
    """A tensor that holds what it claims, of a type that weights have."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.dtype in TYPES
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def weights(value: Any) -> bool:
    """Tensors by their names."""
    return isinstance(value, dict) and all(isinstance(key, str) and plain(part) for key, part in value.items())


def optimizer(value: Any) -> bool:
    """What torch's optimizers keep."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and all(whole(key) and weights(moments) for key, moments in value["state"].items())
        and isinstance(value.get("param_groups"), list)
        and all(
            isinstance(group, dict) and isinstance(group.get("params"), list) and all(map(whole, group["params"]))
            for group in value["param_groups"]
        )
    )


def losses(value: Any) -> bool:
    """Those of some steps, one number for each segment."""
    return isinstance(value, list) and all(
        plain(part) and part.ndim == 1 and part.is_floating_point() and part.shape == value[0].shape for part in value
    )


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("a configuration", lambda value: isinstance(value, dict)),
    "step": ("a whole number", whole),
    "losses": ("a list of the losses of some steps", losses),
    "bad_steps": ("a whole number", whole),
    "phase": ("a whole number", whole),
    "ease": ("two numbers", pair),
    "mean": ("a list of numbers", numbers),
    "std": ("a list of numbers above 0", lambda value: numbers(value) and all(part > 0 for part in value)),
    "model": ("tensors by name", weights),
    "average": ("tensors by name", weights),
    "optimizers": (
        "a list of optimizers' states",
        lambda value: isinstance(value, list) and all(map(optimizer, value)),
    ),
    "architecture": ("an architecture", lambda value: isinstance(value, dict)),
    "classes": ("a list of different names", names),
    "start": ("a digest", lambda value: isinstance(value, str)),
    "best": ("two numbers", pair),
    "accuracy": ("a number", number),
    "epoch": ("a number", number),
    "encoder": ("a digest", lambda value: isinstance(value, str)),
    "head": ("tensors by name", weights),
    "optimizer": ("an optimizer's state", optimizer),
}
"""By name: what the value must be, for people to read, and whether it is. Others are nobody's."""

PRETRAINED = ("config", "step", "mean", "std", "model")
FINETUNED = (*PRETRAINED, "classes", "architecture")
PROBE = ("config", "step", "encoder", "head", "optimizer")


def check(state: dict[str, Any], source: str, resume: bool = False) -> None:
    """Raise UserError for a checkpoint that lacks what its readers need, or holds what they cannot use.

    Args:
        state: the checkpoint.
        source: where it is from, for the message.
        resume: it must hold what training goes on with, too.
    """
    tuned, probe = "classes" in state, "head" in state
    needed = FINETUNED if tuned else PROBE if probe else PRETRAINED
    if resume and not probe:
        needed = (*needed, "optimizers", *(("best", "start") if tuned else ()))
    for name in needed:
        if name not in state:
            raise Damaged(f"{source!r} is damaged: it has no {name}; {REMEDY}")
    for name, (what, fits) in FIELDS.items():
        if name in state and not fits(state[name]):
            raise Damaged(f"{source!r} is damaged: its {name} is not {what}; {REMEDY}")
    if wrong := not_finite(state):
        raise Damaged(f"{source!r} is damaged: {wrong} is not finite; {REMEDY}")
    if not probe:
        check_configuration(state, source, resume)


def check_configuration(state: dict[str, Any], source: str, resume: bool) -> None:
    """Raise UserError if the configuration cannot be, or does not go with the rest."""
    tuned = "classes" in state
    try:
        config: Pretrain | Finetune = (Finetune if tuned else Pretrain).from_json(state["config"])
        config.check()
        own: Model = architecture(state) if isinstance(config, Finetune) else config
        own.check()
        count = 1 if isinstance(config, Finetune) else len(phases(config))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{source!r}: {error if isinstance(error, UserError) else repr(error)}") from error
    for name in ("mean", "std"):
        if len(state[name]) != own.channels:
            raise Damaged(
                f"{source!r} is damaged: its {name} has not a number for each of {own.channels} channels; {REMEDY}"
            )
    if state.get("phase", 0) >= count:
        raise Damaged(f"{source!r} is damaged: it has no phase {state['phase']}; {REMEDY}")
    if resume and config.epochs == "auto":
        raise Damaged(f"{source!r} is damaged: its configuration has no number of epochs; {REMEDY}")


def architecture(state: dict[str, Any]) -> Model:
    """That of a fine-tuned run."""
    own = state["architecture"]
    needed = {name: own[name] for name in ("model", "model_kwargs", "input_size", "channels")}
    return Model(**needed, values=own.get("values", "auto"))


def named_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All weights and moments of a checkpoint, with names for people to read."""
    for part in ("model", "average", "head"):
        yield from ((f"the weight {name}", value) for name, value in state.get(part, {}).items())
    own = [state["optimizer"]] if "optimizer" in state else state.get("optimizers", [])
    for i, optimizer in enumerate(own):
        for key, moments in optimizer["state"].items():
            for name, value in moments.items():
                yield f"{name} of parameter {key} in optimizer {i}", value


def not_finite(state: dict[str, Any]) -> str:
    """The first weight or moment that is not finite; empty if all are."""
    for name, value in named_tensors(state):
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            return name
    return ""
