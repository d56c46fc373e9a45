"""The batches of a run do not depend on workers, nor on where the run was continued."""

import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

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
from leanmim.errors import UserError
from leanmim.processes import Process
from tests.data.pictures import CPU, Files, crops, forks, touch


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
    for cpus, want in ((None, 0), (1, 0), (2, 1), (9, 8), (64, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        assert resolve_workers(-1) == want
        assert resolve_workers(0) == 0 and resolve_workers(20) == 20


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
