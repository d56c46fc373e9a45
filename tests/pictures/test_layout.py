"""How the images of a figure are arranged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from leanmim import pictures
from leanmim.config import Pretrain, Show
from leanmim.errors import UserError
from leanmim.pictures import show
from leanmim.pictures.figures import outline
from tests.data.stored import write
from tests.drawn import Drawn, names, run_of

pytestmark = pytest.mark.usefixtures("whole_pictures")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


@pytest.mark.parametrize(("count", "rows"), [(3, 3), (4, 2), (5, 3), (8, 4)])
def test_from_four_images_on_two_share_a_row(tiny: Pretrain, drawn: Drawn, count: int, rows: int) -> None:
    with Image.open(show(Show(runs=(str(run_of(tiny)),), count=count))) as picture:
        assert picture.width == (819 if count < 4 else 1638)
        assert picture.height == pytest.approx((rows * 2.0 + 0.8) * 130, abs=2)
    assert len(drawn.rows) == len(names(drawn)) == count
    assert drawn.texts.count("original") == (1 if count < 4 else 2)


def test_images_follow_each_other_along_the_rows(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    show(Show(runs=(str(run_of(tiny)),), count=5))
    axes = np.array(figures[0].axes).reshape(3, 6)
    labels = [[axis.get_xlabel() for axis in row[::3]] for row in axes]
    assert labels == [["astronaut.jpg", "canyon.jpg"], ["citrus.jpg", "dandelion.jpg"], ["lemur.jpg", ""]]
    assert [axis.axison for axis in axes[2]] == [True] * 3 + [False] * 3  # where no sixth image is


def test_five_columns_stay_one_image_a_row(tiny: Pretrain) -> None:
    with Image.open(
        show(Show(runs=(str(run_of(replace(tiny, segments=2, mask_ratio=0.75, throw=0.5))),), count=4))
    ) as picture:
        assert (picture.width, picture.height) == (1365, pytest.approx((4 * 2.0 + 0.8) * 130, abs=2))


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (0, 2)])
def test_a_line_goes_round_a_group_of_cells(place: tuple[int, int]) -> None:
    cells = torch.zeros(2, 3, dtype=torch.bool)
    cells[place] = True
    y, x = (4 * side - 0.5 for side in place)
    corners = [(x, y), (x + 4, y), (x + 4, y + 4), (x, y + 4)]
    lines = {frozenset(map(tuple, line)) for line in outline(cells, 4, "white").get_segments()}
    assert lines == {frozenset((corners[i - 1], corners[i])) for i in range(4)}
    whole = outline(torch.ones(2, 3, dtype=torch.bool), 4, "white").get_segments()
    assert len(whole) == 2 * (2 + 3)


def test_several_runs_side_by_side(tiny: Pretrain, tiny_simmim: Pretrain, tmp_path: Path, drawn: Drawn) -> None:
    """On the same images, each at its own size; what they have in common stands once."""
    runs = [str(run_of(replace(config, out=str(tmp_path / name)))) for name, config in (
        ("first", tiny), ("second", replace(tiny, target="raw-pixels")), ("third", tiny_simmim))]  # fmt: skip
    out = tmp_path / "both.png"
    assert show(Show(runs=tuple(runs), count=2, out=str(out))) == out
    assert [text.strip() for text in drawn.texts if text.endswith("\n")] == ["first", "second", "third"]
    assert drawn.texts.count("original") == 2 and len(drawn.pictures) == 2 * (3 + 2 + 3)
    row = drawn.pictures[:8]
    assert [len(picture) for picture in row] == [32] * 5 + [64] * 3
    assert np.array_equal(row[1] == 0.5, row[3] == 0.5)  # one seed
    assert names(drawn) == ["astronaut.jpg", "crab.jpg"]
    note = drawn.texts[-1].splitlines()
    assert [line.partition(":")[0] for line in note[:3]] == ["first", "second", "third"]
    assert sum("own mean" in line for line in note) == 1


def test_the_picture_of_several_runs_is_nobodys_own(
    tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tuple(str(run_of(replace(tiny, out=str(tmp_path / name / "run")))) for name in "ab")
    monkeypatch.chdir(tmp_path)
    assert show(Show(runs=runs, count=1)) == Path("reconstructions.png")
    assert not list(tmp_path.glob("*/run/*.png"))
    with pytest.raises(UserError, match="give the run folder"):
        show(Show(runs=()))


def test_several_runs_that_cannot_read_the_same_images(tiny: Pretrain, tmp_path: Path) -> None:
    write(tmp_path / "data", 2)
    five = run_of(replace(tiny, channels=5, data=str(tmp_path / "data"), out=str(tmp_path / "five")))
    with pytest.raises(UserError, match="give others with --images"):
        show(Show(runs=(str(five), str(run_of(tiny))), count=2))
