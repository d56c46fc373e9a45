"""A reconstruction is the work of one segment's decoder."""

from pathlib import Path

import pytest
import torch
from torch import nn

from leanmim.config import Show
from leanmim.errors import UserError
from leanmim.pictures import show
from leanmim.pictures.reconstructions import predict
from tests.helpers import fake_run, images_of, in_segments, made


def test_show_draws_the_segment_asked_for(tmp_path: Path) -> None:
    trained = fake_run(in_segments(segments=2, mask_ratio=(0.5, 0.75)), tmp_path / "run")
    show(Show(runs=(trained.out,), count=1))
    pictures = []
    for segment in (0, 1, None):
        out = str(tmp_path / f"{segment}.png")
        pictures.append(show(Show(runs=(trained.out,), count=1, out=out, segment=segment)).read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
    whole = (Path(trained.out) / "reconstructions.png").read_bytes()
    assert show(Show(runs=(trained.out,), count=1, segment=0)) == Path(trained.out) / "reconstructions-segment0.png"
    assert (Path(trained.out) / "reconstructions.png").read_bytes() == whole  # the run's own, as in the report
    assert len(set(pictures)) == 3  # without --segment, both are drawn
    with pytest.raises(UserError, match="--segment 2: this run has 2 segments, 0 to 1"):
        show(Show(runs=(trained.out,), count=1, segment=2))


def test_a_reconstruction_is_the_work_of_its_own_decoder() -> None:
    config = in_segments(segments=2, mask_ratio=0.5)
    model, _ = made(config)
    images = images_of(config)
    masks = model.draw_masks(images)
    before = [predict(model, images, masks, segment=i) for i in range(2)]
    nn.init.zeros_(model.decoders[1].head.weight)
    nn.init.zeros_(model.decoders[1].head.bias)
    assert before[0].any() and torch.equal(predict(model, images, masks, segment=0), before[0])
    assert before[1].any() and not predict(model, images, masks, segment=1).any()
