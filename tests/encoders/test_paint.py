"""The colour is painted where the image is masked."""

import pytest
import torch
from torch import Tensor, nn

from leanmim.encoders.paint import paint
from leanmim.masking import Grid, random_fine_mask, random_mask
from tests.families import FAMILIES, fast_families, fastmim


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("finer", [1, 2, 4])
def test_the_image_is_painted_where_it_is_masked_and_nowhere_else(finer: int) -> None:
    grid, side = Grid(2, 3), 32 // finer
    images, colour = torch.randn(3, 3, 64, 96), torch.tensor([1.0, -2.0, 3.0])
    if finer == 1:
        mask = random_mask(torch.rand(3, 6), grid, 0.5)
        squares = [{divmod(place, 3) for place in ids.tolist()} for ids in mask.masked]
    else:
        mask = random_fine_mask(torch.rand(3, 6 * finer**2), grid, 0.5, finer)
        squares = [{(y, x) for y, x in hidden.nonzero().tolist()} for hidden in mask.hidden]
    painted = paint(images, mask, grid, colour)
    for b in range(3):
        assert len(squares[b]) == 3 * finer**2
        for y in range(64):
            for x in range(96):
                expected = colour if (y // side, x // side) in squares[b] else images[b, :, y, x]
                assert torch.equal(painted[b, :, y, x], expected), (b, y, x)


@fast_families
def test_the_backbone_sees_the_painted_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters its first layer is the image outside the mask and the colour inside."""
    encoder = fastmim(name).encoder
    with torch.no_grad():
        encoder.colour.copy_(torch.tensor([1.0, -2.0, 3.0]))
    images = torch.randn(2, 3, *FAMILIES[name].size)
    mask = random_mask(torch.rand(2, encoder.grid.n), encoder.grid, 0.5)
    seen: list[Tensor] = []
    first = next(module for module in encoder.backbone.modules() if isinstance(module, nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    encoder.segment(0, encoder.embed(images, mask))
    handle.remove()
    expected, stride = images.clone(), encoder.stride
    for image, hidden in zip(expected, mask.masked.tolist(), strict=True):
        for place in hidden:
            y, x = divmod(place, encoder.grid.width)
            image[:, stride * y : stride * (y + 1), stride * x : stride * (x + 1)] = encoder.colour.detach()[
                :, None, None
            ]
    height, width = expected.shape[2:]
    assert torch.equal(seen[0][:, :, :height, :width], expected)  # some models pad on the right and below
