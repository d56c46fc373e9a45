"""Features on disk: what the encoder computes, computed once, and again when something has changed."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from leanmim.config import Evaluate, Knn, Pretrain, Probe
from leanmim.data import Files
from leanmim.errors import UserError
from leanmim.evaluators import cache
from leanmim.evaluators.cache import TOKENS, Store, storage
from leanmim.evaluators.evaluate import evaluate
from leanmim.evaluators.features import extract, subjects
from leanmim.evaluators.knn import knn
from leanmim.evaluators.probe import probe
from leanmim.run import Run, save
from tests.evaluators.samples import swin
from tests.helpers import fake_run, in_segments
from tests.runs import untrained

Options = dict[str, object]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The passes over a set: whose, and of how many images."""
    seen: list[tuple[str, int]] = []
    stream = cache.stream

    def watched(subject: cache.Subject, data: cache.Labelled, *rest: object) -> None:
        seen.append((subject.name, len(data)))
        stream(subject, data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "stream", watched)
    return seen


BOTH = [("pretrained", 72), ("pretrained", 24)]


def test_knn_and_probe_share_one_pass(options: Options, passes: list[tuple[str, int]]) -> None:
    first = list(knn(Knn(**options)))  # type: ignore[arg-type]
    assert passes == BOTH
    assert list(knn(Knn(**options))) == first  # type: ignore[arg-type]
    list(probe(Probe(**options)))  # type: ignore[arg-type]
    assert passes == BOTH


def test_the_baselines_have_entries_of_their_own(options: Options, passes: list[tuple[str, int]]) -> None:
    for _ in range(2):
        found = dict(knn(Knn(**options, baselines=True)))  # type: ignore[arg-type]
    assert found["pixels"] == 1.0
    assert [name for name, _ in passes] == ["pretrained"] * 2 + ["random"] * 2 + ["pixels"] * 2


def touched(options: Options) -> None:
    file = Path(str(options["data"])) / "train/red/3.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))


def removed(options: Options) -> None:
    (Path(str(options["data"])) / "train/red/3.png").unlink()


def retrained(options: Options) -> None:
    run = Run(Path(str(options["run"])))
    state = run.read()
    state["model"]["encoder.backbone.blocks.0.mlp.fc1.weight"][0, 0] += 0.01
    save(run.last, state)


def input_size(options: Options) -> None:
    options["input_size"] = (40,)


def crop(options: Options) -> None:
    options["crop"] = 0.9


@pytest.mark.parametrize(
    ("change", "again"),
    [(touched, [72]), (removed, [71]), (retrained, [72, 24]), (input_size, [72, 24]), (crop, [72, 24])],
)
def test_a_change_computes_again(
    change: Callable[[Options], None], again: list[int], options: Options, passes: list[tuple[str, int]]
) -> None:
    list(knn(Knn(**options)))  # type: ignore[arg-type]
    passes.clear()
    change(options)
    list(knn(Knn(**options)))  # type: ignore[arg-type]
    assert [count for _, count in passes] == again


def entries(options: Options) -> set[str]:
    return {file.parent.name for file in (Path(str(options["run"])) / "cache").glob("*/avg.npy")}


def test_what_an_earlier_step_left_is_removed(options: Options) -> None:
    list(knn(Knn(**options, baselines=True)))  # type: ignore[arg-type]
    before = entries(options)
    retrained(options)
    run = Run(Path(str(options["run"])))
    save(run.last, {**run.read(), "step": 8})
    list(knn(Knn(**options)))  # type: ignore[arg-type]
    assert len(before) == len(entries(options)) == 6
    assert len(before & entries(options)) == 4  # the baselines


def test_without_a_cache_nothing_is_kept(options: Options, passes: list[tuple[str, int]]) -> None:
    for _ in range(2):
        list(knn(Knn(**options, cache=False)))  # type: ignore[arg-type]
    assert passes == BOTH * 2
    assert not (Path(str(options["run"])) / "cache").exists()


def test_a_damaged_image_is_left_out_and_told(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = (Path(str(options[name])) for name in ("data", "run"))
    for name in ("train/red/3.png", "val/blue/0.png"):
        (data / name).write_bytes(b"?")
    (_, accuracy), (_, again) = (next(knn(Knn(**options))) for _ in range(2))  # type: ignore[arg-type]
    assert accuracy == again and accuracy.images == 23
    err = capsys.readouterr().err
    for part, count in (("train", 72), ("val", 24)):
        assert err.count(f"1 of {count} images of {data / part} cannot be read and are left out: {data / part}/") == 1
    assert [json.loads(line)["left_out"] for line in Run(run).evaluations.read_text().splitlines()] == [1, 1]
    (subject,) = subjects(Knn(**options))  # type: ignore[arg-type]
    with storage(Knn(**options)) as store:  # type: ignore[arg-type]
        features, _ = store.pair(subject)
    direct = extract(subject.embed, subject.train, subject.normalise, 10, 0)
    assert len(features.y) == 71 and features.y.tolist() == direct.y.tolist()
    np.testing.assert_allclose(features.x, direct.x, atol=1e-5)


def test_other_readable_images_give_features_of_their_own(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that could not be read for a moment, and has not changed."""
    (subject,) = subjects(Knn(**options))  # type: ignore[arg-type]
    source = subject.train.source
    with storage(Knn(**options)) as store, monkeypatch.context() as patch:  # type: ignore[arg-type]
        patch.setattr(source, "read", lambda index: Files.read(source, index) if index else Image.open("nowhere"))
        assert len(store.arrays(subject, subject.train, ["avg"])["avg"]) == 71
        patch.undo()
        both = store.arrays(subject, subject.train, ["avg", "token"])
    assert len(both["avg"]) == len(both["token"]) == len(both["kept"]) == 72


def test_no_readable_image_is_an_error_and_leaves_no_entry(options: Options) -> None:
    for file in Path(str(options["data"]), "val").rglob("*.png"):
        file.write_bytes(b"?")
    with pytest.raises(UserError, match="none of the 24 image files can be read"):
        list(knn(Knn(**options)))  # type: ignore[arg-type]
    assert len(list((Path(str(options["run"])) / "cache").iterdir())) == 1  # of train


@pytest.mark.parametrize("kind", ["vit", "swin", "two stages of a convnext"])
def test_features_are_those_of_the_blocks(
    kind: str, tiny: Pretrain, tiny_simmim: Pretrain, tiles: Path, tmp_path: Path
) -> None:
    """All kinds in one pass; written down by hooks, batch by batch."""
    depth = None
    if kind == "vit":
        run = str(untrained(replace(tiny, model_kwargs={**tiny.model_kwargs, "reg_tokens": 2})))
    elif kind == "swin":
        run = str(untrained(swin(tiny_simmim)))
    else:
        run, depth = fake_run(in_segments("convnext", "pixel"), tmp_path / "convnext").out, 2
    config = Knn(run=run, data=str(tiles), device="cpu", workers=0, batch_size=10, depth=depth)
    (subject,) = subjects(config)
    model = getattr(subject.backbone, "backbone", subject.backbone)
    part = (model.blocks if kind == "vit" else model.layers if kind == "swin" else model.stages)[1]
    outputs: list[Tensor] = []
    handle = part.register_forward_hook(lambda _, __, output: outputs.append(output))
    avg = extract(subject.embed, subject.val, subject.normalise, 10, 0)
    handle.remove()
    second = torch.cat(outputs)
    mean = {"vit": lambda x: x[:, 3:].mean(1), "swin": lambda x: x.mean((1, 2))}.get(kind, lambda x: x.mean((2, 3)))
    with storage(config) as store:
        found = store.arrays(subject, subject.val, ["layer 2", "avg", TOKENS])
    np.testing.assert_allclose(found["avg"], avg.x, atol=1e-5)
    np.testing.assert_allclose(found["layer 2"], mean(second), atol=1e-5)
    assert found[TOKENS].dtype == np.float16
    np.testing.assert_allclose(found[TOKENS].astype(np.float32).mean(1), avg.x, atol=2e-3)


def test_what_does_not_fit_on_the_disk_is_not_begun(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokens of 72 images are 72 x 16 x 32 numbers of two bytes; the mean of each image is 32 of four."""
    config = Evaluate(**options, layers=0)  # type: ignore[arg-type]
    needed, used = 72 * (16 * 32 * 2 + 32 * 4), shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: used._replace(free=needed - 1))
    message = r"of 72 images take 0\.1 MiB in '.*cache', which has 0\.1 MiB free; make room, .* \(--no-attentive, or"
    with pytest.raises(UserError, match=message):
        evaluate(config)
    assert list((Path(str(options["run"])) / "cache").iterdir()) == []
    assert list(knn(Knn(**options)))  # type: ignore[arg-type]
    monkeypatch.setattr(cache, "LARGE", needed - 1)  # without those that are there
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: used._replace(free=needed))
    capsys.readouterr()
    evaluate(replace(config, crop=0.9, epochs=1))
    assert capsys.readouterr().err.count("images take 0.1 MiB in") == 1  # of train, not of val


def test_what_a_killed_command_left_is_removed(options: Options) -> None:
    """But nothing of a command that may be at work."""
    gone, here, folder = (
        subprocess.Popen([sys.executable, "-c", ""]),
        platform.node(),
        Path(str(options["run"])) / "cache",
    )
    gone.wait()
    keep = [f"part-{os.getppid()}-{here}-a", f"part-{gone.pid}-else-where-b"]
    left = [f"part-{gone.pid}-{here}-c", f"part-{os.getpid()}-{here}-d", "part-1-else-where-e"]
    for name in (*keep, *left):
        (folder / name).mkdir(parents=True)
        (folder / name / "tokens.npy").touch()
    os.utime(folder / left[2], (0, time.time() - cache.DAY - 1))
    list(knn(Knn(**options)))  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.glob("part-*")) == sorted(keep)


def test_what_an_earlier_step_of_a_baseline_left_is_removed(options: Options, tiny: Pretrain, tmp_path: Path) -> None:
    other = Run(untrained(replace(tiny, out=str(tmp_path / "other"))))
    for step in (7, 8):
        save(other.last, {**other.read(), "step": step})
        state = other.read()
        state["model"]["encoder.backbone.norm.bias"] += 1
        save(other.last, state)
        list(knn(Knn(**options, baselines=(str(other.folder),))))  # type: ignore[arg-type]
    assert len(entries(options)) == 4


def test_arrays_are_read_from_disk(options: Options, tmp_path: Path) -> None:
    (subject,) = subjects(Knn(**options))  # type: ignore[arg-type]
    found = Store(tmp_path, 7).arrays(subject, subject.val, ["avg"])["avg"]
    assert isinstance(found, np.memmap) and not found.flags.writeable
