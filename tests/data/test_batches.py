"""The batches of a run do not depend on workers, nor on where the run was continued."""

import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from leanmim.config import Pretrain
from leanmim.data import (
    Bad,
    Crops,
    Folder,
    Labelled,
    Order,
    batches,
    centre_crop,
    collate,
    epoch_order,
    list_images,
    loader,
    resolve_workers,
)
from leanmim.data.batches import room_for_a_batch
from leanmim.errors import UserError
from leanmim.processes import Process
from tests.data.pictures import CPU, Files, crops, forks, touch

batches_module = importlib.import_module("leanmim.data.batches")  # the package has a function of this name


def read(data: Crops, workers: int, start: int = 0, stop: int = 6) -> tuple[list[torch.Tensor], list[Bad]]:
    order = Order(len(data), 4, 3, start, stop, seed=0)
    found = list(loader(data, order, workers, CPU, collate))
    return [images for images, _ in found], [bad for _, bads in found for bad in bads]


@forks
def test_batches_do_not_depend_on_workers_or_start(images: list[Path]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    want, _ = read(crops(images), 0)
    assert len(want) == 6 and want[0].shape == (4, 3, 24, 24) and want[0].dtype == torch.uint8
    for workers in (1, 2):
        got, _ = read(crops(images), workers)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    tail, _ = read(crops(images), 2, start=4)
    assert all(torch.equal(a, b) for a, b in zip(tail, want[4:], strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_workers_hold_can_be_pickled(images: list[Path]) -> None:
    """Workers are forked on Linux only, and no longer from Python 3.14 on."""
    data = crops(images)
    assert torch.equal(pickle.loads(pickle.dumps(data))[1, 5][0], data[1, 5][0])
    labelled = Labelled(images[0].parent.parent, 3, centre_crop((16, 24)))
    assert torch.equal(pickle.loads(pickle.dumps(labelled))[2][0], labelled[2][0])
    assert pickle.loads(pickle.dumps(collate)) is collate


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_replaced_by_the_next_and_reported(images: list[Path], workers: int) -> None:
    half = images[2].read_bytes()
    images[2].write_bytes(half[: len(half) // 2])
    images[3].write_text("not a picture")
    images[11].unlink()
    data = crops(images)
    _, bad = data[0, 2]
    assert [report.path for report in bad] == [str(images[2]), str(images[3])]
    assert "OSError" in bad[0].reason and "truncated" in bad[0].reason
    assert "UnidentifiedImageError" in bad[1].reason and "cannot identify" in bad[1].reason
    _, bad = data[0, 11]  # the file after the last is the first
    assert [report.path for report in bad] == [str(images[11])] and "FileNotFoundError" in bad[0].reason

    found, reports = read(data, workers)
    assert all(batch.shape == (4, 3, 24, 24) for batch in found)
    assert {report.path for report in reports} == {str(images[i]) for i in (2, 3, 11)}


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error_without_traceback(tmp_path: Path, workers: int) -> None:
    touch(tmp_path, *(f"{i}.jpg" for i in range(12)))
    with pytest.raises(UserError, match=r"^none of the 12 image files can be read; the first: ") as error:
        read(crops(list_images(tmp_path)), workers)
    assert str(tmp_path) in str(error.value) and "UnidentifiedImageError" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert not multiprocessing.active_children()  # though the error is still in hand


def test_workers_are_counted_from_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, want, most in ((1, 0, 32), (2, 1, 32), (9, 8, 144), (16, 8, 256), (64, 32, 1024), (256, 128, 1024)):
        for module in ("leanmim.data.batches", "leanmim.device"):
            monkeypatch.setattr(sys.modules[module], "cpus", lambda cores=cores: cores)
        assert resolve_workers(-1) == want
        assert resolve_workers(0) == 0 and resolve_workers(20) == 20 and resolve_workers(most) == most
        with pytest.raises(UserError, match=f"--workers {most + 1} is too many .* give {most} at most"):
            resolve_workers(most + 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert resolve_workers(-1) == 16  # of the 32 cores that each of eight processes has


def test_the_feed_leaves_torchs_random_numbers_alone(tiny: Pretrain, photos: Path) -> None:
    """They draw the masks."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for _ in batches(tiny, Folder(photos, 3), 0, 5):
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_batches_of_a_run_are_its_crops_in_its_order(tiny: Pretrain, images: list[Path]) -> None:
    config = replace(tiny, batch_size=2, accum=2, crop_scale=(0.5, 0.6), flip=0.3, seed=7)
    source = Files(images)
    data = Crops(source, (32, 32), (0.5, 0.6), (3 / 4, 4 / 3), 0.3, seed=7)
    order = epoch_order(12, 7, 0).tolist()
    for rank in range(2):
        found = [images for images, _ in batches(config, source, 0, 1, Process(rank, 2))]
        first = [order[2 * rank : 2 * rank + 2], order[4 + 2 * rank : 6 + 2 * rank]]
        assert len(found) == 2
        for batch, indices in zip(found, first, strict=True):
            assert torch.equal(batch, torch.stack([data[0, index][0] for index in indices]))
    whole, tail = ([images for images, _ in batches(config, source, start, 3)] for start in (0, 1))
    assert len(whole) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], tail, strict=True))


# Shared memory, readers that die, images that are away.


@forks
def test_with_little_shared_memory_batches_come_through_pipes(
    tiny: Pretrain, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, source = replace(tiny, workers=2), Folder(photos, 3)
    shared = list(batches(config, source, 0, 4))
    assert "shared memory" not in capsys.readouterr().err
    asked = []

    def disk_usage(path: str) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=10_000)  # a batch takes 12,288

    monkeypatch.setattr(batches_module.shutil, "disk_usage", disk_usage)
    batches_module.say_once.cache_clear()
    sent: list[type] = []
    tensors = batches_module.tensors
    monkeypatch.setattr(batches_module, "tensors", lambda batch: sent.append(type(batch[0])) or tensors(batch))
    piped = [batch for _ in range(2) for batch in batches(config, source, 0, 4)]
    assert asked == ["/dev/shm"] * 2 and sent == [np.ndarray] * 8
    for one, two in zip(shared * 2, piped, strict=True):
        assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert capsys.readouterr().err.count("shared memory (/dev/shm) is too small") == 1


def test_a_folder_for_temporary_files_with_a_long_path(
    tiny: Pretrain, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No socket fits into it."""
    place = tmp_path / ("long" * 30)
    place.mkdir()
    want = list(batches(tiny, Folder(photos, 3), 0, 2))
    monkeypatch.setattr(batches_module.tempfile, "tempdir", str(place))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # where multiprocessing keeps it
    batches_module.say_once.cache_clear()
    found = list(batches(replace(tiny, workers=2), Folder(photos, 3), 0, 2))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(want, found, strict=True))
    assert "too long for shared memory, give a shorter one (TMPDIR)" in capsys.readouterr().err


def test_all_that_is_read_ahead_counts_for_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    assert 10 * room_for_a_batch(2) < 64 * 2**20 < 12 * room_for_a_batch(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 20 * room_for_a_batch(2) < 64 * 2**20 < 24 * room_for_a_batch(2)

    def none(_: str) -> SimpleNamespace:
        raise FileNotFoundError

    monkeypatch.setattr(batches_module.shutil, "disk_usage", none)
    assert room_for_a_batch(2) > 2**40


@forks
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signal")
def test_a_killed_reader_is_told_to_who_waits_for_it(tiny: Pretrain, photos: Path) -> None:
    """Not in the middle of a step."""
    feed = batches(replace(tiny, workers=2), Folder(photos, 3), 0, 400)
    next(feed)
    victim = multiprocessing.active_children()[0]
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    time.sleep(0.01)  # torch's handler of SIGCHLD would raise here
    with pytest.raises(UserError, match=r"a process that reads images ended .*fewer --workers"):
        list(feed)
    assert not multiprocessing.active_children()


class Clock:
    """Of a loader; something may happen while it sleeps."""

    def __init__(self, happens: dict[int, Callable[[], object]]) -> None:
        self.now, self.slept, self.happens = 0.0, list[float](), happens

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.happens.get(len(self.slept), int)()


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_away_are_waited_for(
    images: list[Path], workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = images[0].parent
    data = crops_of(root)
    order = Order(12, 4, 3, 0, 24, seed=0)
    want = [batch for batch, _ in loader(data, order, 0, CPU, collate)]
    clock = Clock({3: lambda: root.with_name("away").rename(root)})
    monkeypatch.setattr(batches_module, "time", clock)
    feed = loader(data, order, workers, CPU, collate, 5.0)
    got = [next(feed) for _ in range(3)]
    root.rename(root.with_name("away"))
    got += feed
    assert all(torch.equal(one, two[0]) for one, two in zip(want, got, strict=True))
    assert not any(bad for _, bad in got)
    assert clock.slept == [1, 1, 2]
    err = capsys.readouterr().err
    assert err.count("leanmim: the images are away: ") == err.count("\n") == 1
    assert err.endswith("waiting up to 5 minutes (--data-patience)\n")


@pytest.mark.parametrize("patience", [0.0, 5.0])
def test_images_that_stay_away_are_an_error(
    images: list[Path], patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, clock = crops_of(images[0].parent), Clock({})
    for file in images:
        file.unlink()
    monkeypatch.setattr(batches_module, "time", clock)
    with pytest.raises(UserError, match=r"the images are away: .*png cannot be reached .* give the same command again"):
        list(loader(data, [[(0, 0)]], 0, CPU, collate, patience))
    assert clock.now == 60 * patience
    assert max(clock.slept, default=0) <= 60


def crops_of(folder: Path) -> Crops:
    return Crops(Folder(folder, 3), (24, 24), (0.2, 1.0), (0.75, 4 / 3), 0.5, 0)
