"""Features on disk: computed once for each encoder and set of images, streamed into files, used again as long as nothing
has changed.

An entry of the cache is a folder named by a digest of the weights, the input size, the crop and the files; it holds an array
for each kind of features: a pooling (``avg``, ``token``, ``timm``), the mean of the patches after some block (``layer 6``),
the patch tokens themselves as the model's last norm before any pooling leaves them (``tokens``, in half precision).

b batch, c channels, H W pixels, n patches, d width.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import timm
import torch
from jaxtyping import Float
from rich.markup import escape
from torch import Tensor

from leanmim.config import Evaluator
from leanmim.data import Bad, Files, Labelled, Shards, loader
from leanmim.data.readable import collate_readable, tell_left_out
from leanmim.data.source import nothing_readable
from leanmim.encoders.backbone import Backbone, as_tokens
from leanmim.errors import UserError
from leanmim.evaluators.features import Features, Subject, pooled, read_layers, run_folder
from leanmim.files import readable, writable
from leanmim.progress import track
from leanmim.version import __version__
from leanmim.weights import digest

TOKENS = "tokens"
KEPT = "kept"  # which images of the set the rows are of
LARGE = 2**30  # bytes of features from which on it is said how much they take
DAY = 86400.0  # s


def layer_name(layer: int) -> str:
    """Of the mean of the patches after so many blocks or stages."""
    return f"layer {layer}"


class Store:
    """Features in a folder.

    Args:
        folder: of the cache.
        batch_size: images per forward pass.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.digests: dict[str, str] = {}  # of the weights of subjects, by their names

    def pair(self, subject: Subject, name: str = "", also: Sequence[str] = ()) -> tuple[Features, Features]:
        """Features of the training and of the validation images, in memory.

        Args:
            subject: whose.
            name: of the features; empty is the subject's own pooling.
            also: names of those that will be asked for next, to be computed in the same pass.
        """
        own, device = name or subject.pool, subject.normalise.device

        def read(data: Labelled) -> Features:
            arrays = self.arrays(subject, data, [own, *also])
            labels = data.labels_of(arrays[KEPT].tolist()).to(device)
            return Features(torch.tensor(np.asarray(arrays[own]), device=device), labels)

        return read(subject.train), read(subject.val)

    def arrays(self, subject: Subject, data: Labelled, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Features of the readable images of a set as read-only arrays on disk, and their places in the set as ``kept``. Those
        that are not there are computed, all in one pass.
        """
        entry = self.folder / self.digest(subject, data)
        missing = [name for name in names if not (entry / f"{name}.npy").is_file()]
        if missing or not (entry / f"{KEPT}.npy").is_file():
            self.forget(subject)
            self.folder.mkdir(exist_ok=True)
            with TemporaryDirectory(prefix=f"part-{os.getpid()}-{platform.node()}-", dir=self.folder) as part:
                stream(subject, data, missing or list(names), self.batch_size, Path(part))
                about = {"name": subject.name, "step": subject.step, "folder": str(data.source.root)}
                Path(part, "about.json").write_text(json.dumps(about))
                if entry.is_dir() and not same_images(entry, Path(part)):
                    shutil.rmtree(entry)  # what is there is of other images: some became readable, or unreadable
                entry.mkdir(exist_ok=True)
                for file in Path(part).iterdir():
                    os.replace(file, entry / file.name)
            return self.arrays(subject, data, names)
        kept = np.load(entry / f"{KEPT}.npy")
        tell_left_out(data.source, kept.tolist())
        return {name: np.load(entry / f"{name}.npy", mmap_mode="r")[: len(kept)] for name in names} | {KEPT: kept}

    def digest(self, subject: Subject, data: Labelled) -> str:
        """Of all that features depend on."""
        if subject.name not in self.digests:
            self.digests[subject.name] = digest_of_weights(subject.backbone)
        files = stamps(data.source)
        mean, std = (value.flatten().tolist() for value in (subject.normalise.mean, subject.normalise.std))
        weights, versions = self.digests[subject.name], (__version__, timm.__version__)
        facts = (weights, versions, subject.size, subject.crop, data.source.channels, mean, std, files)
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def forget(self, subject: Subject) -> None:
        """Remove what an earlier step of the same run left: nobody will ask for it again."""
        for about in self.folder.glob("*/about.json"):
            there = json.loads(about.read_text())
            if there["name"] == subject.name and there["step"] != subject.step:
                shutil.rmtree(about.parent)

    def clean(self) -> None:
        """Remove what killed commands left unfinished; no command of this process is at work yet."""
        for part in self.folder.glob("part-*"):
            _, pid, *host, _ = part.name.split("-")
            if "-".join(host) != platform.node():  # whose processes are not seen from here
                killed = time.time() - part.stat().st_mtime > DAY
            else:
                killed = int(pid) == os.getpid() or not psutil.pid_exists(int(pid))
            if killed:
                shutil.rmtree(part)


def stamps(source: Files | Shards) -> list[Any]:
    """What tells the images of a source from others, without reading them."""
    if isinstance(source, Shards):
        files = [file_facts(path, path) for path in source.paths]
        return [*files, *zip(source.names, source.places.tolist(), strict=True)]
    return [file_facts(name, source.where(i)) for i, name in enumerate(source.names)]


def same_images(one: Path, two: Path) -> bool:
    """Whether the features in two folders are of the same images."""
    files = [folder / f"{KEPT}.npy" for folder in (one, two)]
    return all(map(Path.is_file, files)) and np.array_equal(*map(np.load, files))


@contextmanager
def storage(config: Evaluator) -> Iterator[Store]:
    """Where features are kept: in the run folder, or until the end only if there is none or --no-cache."""
    folder = run_folder(config) if config.cache else None
    if folder is not None and writable(folder / "cache"):
        store = Store(folder / "cache", config.batch_size)
        store.clean()
        yield store
        return
    with TemporaryDirectory() as temporary:
        yield Store(Path(temporary), config.batch_size)


def digest_of_weights(backbone: Backbone | None) -> str:
    """Of an encoder's structure and weights."""
    structure = re.sub(r"0x[0-9a-f]+", "", repr(backbone))  # addresses differ from process to process
    return digest({} if backbone is None else backbone.state_dict(), structure)


def file_facts(name: str, path: str) -> tuple[str, int, int]:
    """A file's name, its size and when it was written: enough to see that it has changed; -1 where there is none."""
    try:
        known = os.stat(path)
    except OSError:  # a link to nowhere: who reads it says so
        return name, -1, -1
    return name, known.st_size, known.st_mtime_ns


@torch.inference_mode()
def stream(subject: Subject, data: Labelled, names: Sequence[str], batch_size: int, folder: Path) -> None:
    """Compute features and write them as NAME.npy, never more than a batch of them in memory; the places of the images that can
    be read as kept.npy, whose rows come first.

    Raises:
        UserError: they do not fit on the disk, or no image can be read.
    """
    image = torch.zeros(1, data.source.channels, *subject.size, device=subject.normalise.device)
    shapes = {name: (len(data), *value.shape[1:]) for name, value in kinds(subject, image, names).items()}
    types = {name: np.dtype(np.float16 if name == TOKENS else np.float32) for name in shapes}
    check_room(folder, subject, len(data), {name: prod(shapes[name]) * types[name].itemsize for name in shapes})
    arrays: dict[str, Any] = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", types[name], shape)
        for name, shape in shapes.items()
    }
    order = [list(range(a, min(a + batch_size, len(data)))) for a in range(0, len(data), batch_size)]
    feed = loader(data.pictures, order, subject.workers, subject.normalise.device, collate_readable)
    kept, unreadable = list[int](), list[Bad]()
    for images, places, bad in track(feed, f"{escape(subject.name)} features of {len(data)} images", len(order)):
        unreadable += bad
        if not places:
            continue
        for name, value in kinds(subject, subject.normalise(images), names).items():
            arrays[name][len(kept) : len(kept) + len(value)] = value.float().cpu().numpy()
        kept += places
    if not kept:
        raise nothing_readable(len(data), unreadable[0])
    for array in arrays.values():
        array.flush()
    np.save(folder / f"{KEPT}.npy", np.array(kept))


def check_room(folder: Path, subject: Subject, images: int, sizes: dict[str, int]) -> None:
    """Say how much room features take if it is much, and raise UserError if there is not so much.

    Arrays on disk take room as they are filled, so that a full disk would show late, and as a crash.
    """
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    what = f"{subject.name} features of {images:,} images take {readable(needed)} in {str(folder.parent)!r}"
    if needed > free:
        tokens = " or leave the attentive probe out (--no-attentive, or another --solver)" if TOKENS in sizes else ""
        raise UserError(f"{what}, which has {readable(free)} free; make room, give fewer images{tokens}")
    if needed >= LARGE:
        print(what, file=sys.stderr)


def kinds(subject: Subject, images: Float[Tensor, "b c H W"], names: Sequence[str]) -> dict[str, Tensor]:
    """Features of several kinds, from one forward pass."""
    backbone = subject.backbone
    if list(names) == [subject.pool] or backbone is None:
        return {name: subject.embed(images) for name in names}
    layers = sorted(int(name.split()[1]) for name in names if name.startswith("layer "))
    features, maps = read_layers(backbone, images, layers)
    found = {layer_name(layer): part.mean((2, 3)) for layer, part in zip(layers, maps, strict=True)}
    for name in names:
        if name == TOKENS:
            found[name] = as_tokens(backbone, features)
        elif name not in found:
            found[name] = pooled(backbone, name, features)
    return found
