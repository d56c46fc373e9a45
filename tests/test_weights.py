"""Weights go to another segmentation, another size, fewer blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from leanmim.config import Export, Knn
from leanmim.decoder import sincos
from leanmim.errors import UserError
from leanmim.evaluators.knn import knn
from leanmim.factory import build
from leanmim.formats import export
from leanmim.weights import carry_over, initialise, load_backbone, restore
from tests.helpers import PHOTOS, equal, fake_run, first_blocks, in_segments


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (1, 4), ((1, 3, 4), (3, 4)), (2, 2)])
def test_weights_go_where_a_segment_ends_after_the_same_block(before: Any, after: Any, tmp_path: Path) -> None:
    """--init from a run of other segments."""
    base = in_segments(segments=before, mask_ratio=0.5)
    _, old, _ = restore(fake_run(base, tmp_path / "run").out)
    torch.manual_seed(5)
    new = build(replace(base, segments=after))
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    said = initialise(new, str(tmp_path / "run"))
    for i, depth in enumerate(new.encoder.depths):
        shared = depth in old.encoder.depths
        j = old.encoder.depths.index(depth) if shared else 0
        for mine, theirs, start in (
            (new.decoders[i], old.decoders[j], f"decoders.{i}."),
            (new.encoder.closing_norm(i), old.encoder.closing_norm(j), f"encoder.norms.{i}."),
        ):
            for name, value in mine.state_dict().items():
                assert torch.equal(value, theirs.state_dict()[name] if shared else fresh[start + name]), (depth, name)
        assert (f"decoders.{depth}" in said) == (f"norms.{depth}" in said) == (not shared)


def test_a_decoder_that_learns_to_fill_takes_the_rest_from_one_that_did_not(tmp_path: Path) -> None:
    base = in_segments(segments=1, mask_ratio=0.75)
    _, old, _ = restore(fake_run(base, tmp_path / "run").out)
    new = build(replace(base, throw=0.25))
    assert "new are decoders.4.filling" in initialise(new, str(tmp_path / "run"))
    assert torch.equal(new.decoders[0].head.weight, old.decoders[0].head.weight)
    deeper = build(replace(base, decoder_depth=2))
    assert "its decoder has another shape" in initialise(deeper, str(tmp_path / "run"))
    assert not torch.equal(deeper.decoders[0].head.weight, old.decoders[0].head.weight)


def test_depths_go_to_another_size(tmp_path: Path) -> None:
    config = fake_run(in_segments(), tmp_path / "vit")
    _, trained, _ = restore(config.out)
    vit, images = trained.eval().encoder.backbone, torch.randn(2, 3, 48, 64)
    positions = timm.layers.resample_abs_pos_embed(vit.pos_embed, (6, 8))
    for depth in (1, 3):
        ours, _, _ = load_backbone(config.out, (48, 64), depth)
        expected = trained.encoder.norms[depth - 1](first_blocks(vit, images, depth, positions))
        assert torch.allclose(ours.forward_features(images), expected, atol=1e-6)

    config = fake_run(in_segments("convnext", "pixel"), tmp_path / "convnext")
    _, trained, _ = restore(config.out)
    backbone, images = trained.eval().encoder.backbone, torch.randn(2, 3, 96, 64)
    ours, _, _ = load_backbone(config.out, (96, 64), 2)
    x = backbone.stages[1](backbone.stages[0](backbone.stem(images))).flatten(2).transpose(1, 2)
    assert torch.allclose(ours.forward_features(images), trained.encoder.borders.norms[1](x), atol=1e-6)

    config = fake_run(in_segments("swin", "token"), tmp_path / "swin")
    _, trained, _ = restore(config.out)
    ours, _, _ = load_backbone(config.out, (128, 64), 3)
    assert len(ours.layers) == 3 and ours(torch.randn(1, 3, 128, 64)).shape == (1, 96)
    assert equal(ours.norm.state_dict(), trained.encoder.borders.norms[2].state_dict())


def test_a_depth_at_which_no_segment_ends(tmp_path: Path) -> None:
    config = fake_run(in_segments(segments=(1, 2, 4), mask_ratio=0.5), tmp_path / "run")
    for depth in (3, 5):
        for call in (
            lambda depth=depth: export(Export(run=config.out, depth=depth)),
            lambda depth=depth: load_backbone(config.out, depth=depth),
            lambda depth=depth: next(knn(Knn(run=config.out, data=str(PHOTOS), depth=depth))),
        ):
            with pytest.raises(UserError, match=rf"--depth {depth}:.* end at 1, 2, 4; choose one of these"):
                call()


def test_positions_are_interpolated_sine_cosine_ones_too() -> None:
    old, new = (build(in_segments(input_size=(side,))).encoder for side in (32, 64))
    carry_over(old, new)
    expected = timm.layers.resample_abs_pos_embed(old.backbone.pos_embed, list(new.grid))
    assert torch.allclose(new.backbone.pos_embed, expected, atol=1e-6)
    assert not torch.allclose(new.backbone.pos_embed[0, 1:], sincos(new.grid, 32), atol=1e-2)
    old.backbone.pos_embed.data.fill_(0.25)
    carry_over(old, new)
    assert torch.allclose(new.backbone.pos_embed, torch.tensor(0.25))
