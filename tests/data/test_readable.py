"""Every readable image of a source once."""

from pathlib import Path

import pytest
import torch

from leanmim.data import Bad, Folder, centre_crop
from leanmim.data.readable import image_batches
from leanmim.errors import UserError
from tests.helpers import PHOTOS


@pytest.mark.parametrize("workers", [0, 1])
def test_any_source_is_read_in_batches_in_its_order(workers: int) -> None:
    source = Folder(PHOTOS, 3)
    batches = list(image_batches(source, centre_crop((8, 8)), 5, workers, print))
    assert [place for _, places in batches for place in places] == list(range(16))
    assert [len(images) for images, _ in batches] == [5, 5, 5, 1]
    assert torch.equal(batches[3][0][0], centre_crop((8, 8))(source.read(15)))


def test_what_cannot_be_read_is_left_out_and_reported(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes() if i == 1 else b"none")
    bad: list[Bad] = []
    ((images, places),) = image_batches(Folder(tmp_path, 3), centre_crop((8, 8)), 2, 0, bad.extend)
    assert (len(images), places) == (1, [1])
    assert [Path(found.path).name for found in bad] == ["0.jpg", "2.jpg"]
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(UserError, match="none of the 2 image files can be read"):
        list(image_batches(Folder(tmp_path, 3), centre_crop((8, 8)), 2, 0, bad.extend))
