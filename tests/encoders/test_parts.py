"""What each segment trains: every parameter belongs to exactly one."""

import pytest

from leanmim.factory import build
from tests.helpers import in_segments, owners_of

RATIOS = {1: 0.5, 4: (0.5, 0.75, 0.75, 0.75)}
KINDS = [
    ("vit", "drop"), ("vit", "token"), ("vit", "pixel"), ("vit, registers, average", "drop"),
    ("swin", "token"), ("swin", "pixel"), ("swin v2", "pixel"), ("convnext", "pixel"), ("pvt", "pixel"),
]  # fmt: skip


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize(("backbone", "masking"), KINDS)
def test_every_trained_parameter_belongs_to_exactly_one_segment(backbone: str, masking: str, segments: int) -> None:
    model = build(in_segments(backbone, masking, segments=segments, mask_ratio=RATIOS[segments]))
    own = [model.parameters_of(i) for i in range(segments)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(own)
    assert sum(map(len, own)) == len(trained)
    assert {p for parameters in own for p in parameters} == set(trained)
    for parameters in own:  # in the order of the model's own, so that an optimizer's state can be continued
        assert parameters == [p for p in trained if p in set(parameters)]


@pytest.mark.parametrize(("backbone", "masking"), KINDS)
def test_a_segment_trains_its_decoder_its_norm_and_the_token_that_it_begins_with(backbone: str, masking: str) -> None:
    owners = owners_of(build(in_segments(backbone, masking, mask_ratio=RATIOS[4])))
    for i in range(4):
        assert owners[f"decoders.{i}.head.weight"] == i
    for i in range(3):
        (norm,) = {name for name in owners if name.endswith(f"norms.{i}.weight") and "backbone" not in name}
        assert owners[norm] == i
    tokens = {name: i for name, i in owners.items() if ".tokens." in name}
    assert set(tokens.values()) == (set() if masking == "drop" else {1})  # the mask grows at the first border only
    own = {name.rpartition(".")[2]: i for name, i in owners.items() if name in ("encoder.mask_token", "encoder.colour")}
    assert own == {"drop": {}, "token": {"mask_token": 0}, "pixel": {"colour": 0}}[masking]


@pytest.mark.parametrize(("backbone", "masking"), [kind for kind in KINDS if kind[1] != "drop"])
@pytest.mark.parametrize(
    ("ratios", "borders"),
    [((0.5,) * 4, set()), ((0.5, 0.75, 0.75, 0.75), {"0"}), ((0.25, 0.25, 0.5, 0.75), {"1", "2"})],
)
def test_a_border_where_the_mask_does_not_grow_has_no_token(
    backbone: str, masking: str, ratios: tuple[float, ...], borders: set[str]
) -> None:
    encoder = build(in_segments(backbone, masking, mask_ratio=ratios)).encoder
    tokens = encoder.tokens if hasattr(encoder, "tokens") else encoder.borders.tokens
    assert set(tokens.keys()) == borders
    for border in borders:
        assert tokens[border].shape == (dict(encoder.named_modules())[norm_of(encoder, border)].weight.shape)


def norm_of(encoder: object, border: str) -> str:
    """The norm on the other side of a border: it has the width of what crosses it."""
    return f"norms.{border}" if hasattr(encoder, "norms") else f"borders.norms.{border}"
