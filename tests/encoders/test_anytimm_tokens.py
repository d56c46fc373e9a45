"""Where the tokens of any timm backbone sit."""

import pytest
import torch
from torch import nn

from leanmim.encoders import make_encoder
from leanmim.evaluators.features import embedding
from leanmim.masking import Grid
from tests.families import FAMILIES, HIERARCHICAL, backbone_of, families, fastmim, heaviest_patch, stages_of, tokens_of
from tests.helpers import nothing_masked


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@families
def test_strides_grids_and_widths_are_those_of_the_backbone(name: str) -> None:
    family = FAMILIES[name]
    encoder = make_encoder(backbone_of(name), "pixel", family.size)
    assert encoder.stride == family.stride
    assert encoder.grid == Grid(family.size[0] // family.stride, family.size[1] // family.stride)
    assert encoder.widths == (encoder.backbone.num_features,)
    tokens = tokens_of(encoder.eval(), torch.randn(2, 3, *family.size))
    assert tokens.shape == (2, encoder.grid.n, encoder.backbone.num_features)
    places = encoder.positions(nothing_masked(encoder.grid.n, 2))
    expected = [*range(encoder.grid.n, encoder.grid.n + encoder.prefix_tokens), *range(encoder.grid.n)]
    assert places.tolist() == [expected, expected]


# Not those whose tokens, at random weights, look at everything alike: for them see the next test
LOCAL = [name for name in FAMILIES if name not in ("efficientnet_lite0", "mobilevit_xxs", "levit_128s")]


@pytest.mark.parametrize("name", LOCAL)
def test_a_token_depends_most_on_the_patch_at_its_position(name: str) -> None:
    encoder = make_encoder(backbone_of(name), "pixel", FAMILIES[name].size)
    positions = encoder.positions(nothing_masked(encoder.grid.n))[0, encoder.prefix_tokens :]
    assert torch.equal(heaviest_patch(encoder, FAMILIES[name].size), positions)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_a_token_of_the_first_stages_depends_most_on_the_patch_at_its_position(name: str) -> None:
    encoder = fastmim(name, depth=3, linear_init="timm").encoder  # Xavier's weights look at everything alike
    assert encoder.stride == 16
    assert torch.equal(heaviest_patch(encoder, (64, 96)), torch.arange(24))


def test_a_wrong_order_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(backbone_of("convnext_atto"), "pixel", (64, 96))
    by_columns = torch.arange(6).view(2, 3).T.flatten()
    read = encoder.read
    monkeypatch.setattr(encoder, "read", lambda i, x: read(i, x)[:, by_columns])
    assert torch.equal(heaviest_patch(encoder, (64, 96)), by_columns)


INTERMEDIATE = [name for name in FAMILIES if "efficientnet" not in name]  # whose last convolution timm leaves out there


@pytest.mark.parametrize("name", INTERMEDIATE)
def test_tokens_are_timms_own_feature_map_read_row_by_row(name: str) -> None:
    encoder = make_encoder(backbone_of(name), "pixel", FAMILIES[name].size).eval()
    images = torch.randn(2, 3, *FAMILIES[name].size)
    last = len(encoder.backbone.feature_info) - 1
    features = stages_of(encoder.backbone, last, images)
    tokens = tokens_of(encoder, images)
    norm = getattr(encoder.backbone, "norm", None)  # timm's intermediates come before it
    if not isinstance(norm, nn.LayerNorm):
        norm = getattr(encoder, "final_norm", nn.Identity())
    for y in range(encoder.grid.height):
        for x in range(encoder.grid.width):
            expected = norm(features[:, :, y, x])
            assert torch.allclose(tokens[:, y * encoder.grid.width + x], expected, rtol=1e-4, atol=1e-5), (y, x)


def test_channels_last_is_not_taken_for_channels_first() -> None:
    """Where a grid is as wide as the features, as Swin-T's first stage is at 384 px, shapes do not tell."""
    encoder = fastmim("swin_tiny_patch4_window7_224", depth=1, input_size=(96,), hog_cell=4).encoder.eval()
    backbone = encoder.backbone
    images = torch.randn(1, 3, 96, 96)
    features = backbone.forward_features(images)
    assert features.shape == (1, 24, 24, 24)
    assert torch.equal(tokens_of(encoder, images), encoder.norm(features.flatten(1, 2)))
    assert torch.equal(embedding(backbone, "avg")(images), features.mean((1, 2)))
