"""The page's pictures: over training time, and what else lies in a run folder."""

from pathlib import Path

import torch

from leanmim.config import Pretrain, Report
from leanmim.data import Normalise
from leanmim.factory import build
from leanmim.page import report
from leanmim.page.sections import CAPTIONS
from leanmim.pictures.over_time import write_strip
from leanmim.run import Run
from tests.page.pages import FINETUNE, PIXEL, Page, make, tuned


def strips(folder: str, config: Pretrain, *steps: int) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalise = Normalise([0.5] * 3, [0.25] * 3, torch.device("cpu"))
    for step in steps:
        write_strip(Run(Path(folder)).strip(step), config, build(config), normalise, images, 0)


def test_pictures_over_time_a_column_for_each_step(tiny: Pretrain, tmp_path: Path) -> None:
    runs = [make(tmp_path / name, tiny) for name in ("first", "second", "third", "none")]
    strips(runs[0], tiny, 0, 1000)
    strips(runs[1], tiny, 0)
    strips(runs[2], tiny, 5)
    Run(Path(runs[2])).strip(5).write_bytes(b"damaged")
    page = Page(report(Report(runs=tuple(runs))))
    body = page.source.split("<h2>Reconstructions over training time</h2>")[1].split("<h2>")[0]
    assert body.count('class="strips"') == 3 and body.count("<img") == 4 + 3
    assert [name in body for name in ("first", "second", "third", "none<")] == [True, True, True, False]
    for title in ("original", "masked", "step 0", "step 1,000"):
        assert f"<div>{title}<img" in body
    assert "cannot be read as pre-training wrote it" in body
    assert "overflow-x: auto" in page.source and "flex-wrap: wrap" in page.source.split("@media print")[1]


def test_pictures_that_lie_in_a_run_folder_have_captions(tiny: Pretrain, tmp_path: Path) -> None:
    runs = (make(tmp_path / "run", tiny, **dict.fromkeys(CAPTIONS, PIXEL)), make(tmp_path / "bare", tiny))
    source = Page(report(Report(runs=runs))).source
    body = source.split("<h2>Pictures</h2>")[1].split("<h2>")[0]
    assert body.count("<img") == 4 and all(f"run: {caption}</figcaption>" in body for caption in CAPTIONS.values())
    assert "<h2>Pictures</h2>" not in Page(report(Report(runs=(runs[1],)))).source
    mistaken = Page(report(Report(runs=(tuned(tmp_path / "tuned", FINETUNE),)))).source
    assert "<h2>Pictures</h2>" not in mistaken  # its mistakes are among its results
