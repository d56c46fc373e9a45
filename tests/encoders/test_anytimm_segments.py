"""Any timm backbone in segments: one after the other they are the backbone."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from leanmim.encoders import make_encoder
from leanmim.encoders.backbone import create_backbone
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.masking import Grid
from leanmim.recipes import FASTMIM
from leanmim.step import update
from tests.helpers import images_of, in_segments, made, of_segments, side_by_side

CUT = {
    "resnet18": {}, "efficientnet_b0": {}, "pvt_v2_b0": {}, "mobilevit_xxs": {}, "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24}, "regnetx_002": {},
}  # fmt: skip


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", CUT)
def test_segments_one_after_the_other_are_the_backbone(name: str, equal: bool) -> None:
    backbone = create_backbone(name, (64, 64), 3, **CUT[name])
    first = len(backbone.feature_info) - 3  # some families count their stem as a stage
    segments = 4 if equal else (first, first + 3)
    encoder = make_encoder(backbone, "pixel", (64, 64), segments=segments).eval()
    x = images = torch.randn(2, 3, 64, 64)
    ends = range(4 if equal else 2)
    with torch.no_grad():
        for i in ends:
            x = encoder.segment(i, x)
            tokens = encoder.read(i, x)
            assert tokens.shape == (2, 4, encoder.widths[i])
            if i < ends[-1]:
                assert x.shape[1:] != backbone.forward_features(images).shape[1:]
                rows = x if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
                assert torch.equal(tokens, side_by_side(encoder.borders.norms[i](rows), Grid(2, 2)))
        assert torch.equal(x, backbone.forward_features(images))
    assert encoder.depths[-1] == len(backbone.feature_info)
    assert encoder.depths == (tuple(range(first, first + 4)) if equal else segments)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "pvt_v2_b0", "convnext_atto"])
def test_every_parameter_is_trained_by_the_optimizer_of_one_segment(name: str) -> None:
    config = replace(in_segments("convnext", "pixel", mask_ratio=(0.4, 0.5, 0.6, 0.7)), model=name, mask_unit=16)
    model, optimizers = made(config)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    segments = of_segments(optimizers)
    assert sum(map(len, segments)) == len(names)
    assert len({id(p) for segment in segments for p in segment}) == len(names)
    before = deepcopy(dict(model.named_parameters()))
    for step in range(2):
        update(model, optimizers, [images_of(config, 4, step)])
    changed = [key for key, p in model.named_parameters() if not torch.equal(p, before[key])]
    assert changed == names
    assert set(names) >= {f"encoder.borders.{part}" for part in ("tokens.2", "norms.2.weight", "norms.0.bias")}


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("hiera_tiny_224", 224, {"embed_dim": 24}),
        ("twins_svt_small", 64, {}),
        ("deit_tiny_distilled_patch16_224", 32, {"depth": 4, "embed_dim": 24, "num_heads": 2}),
        ("beit_base_patch16_224", 32, {"depth": 4, "embed_dim": 24, "num_heads": 2}),
    ],
)
def test_families_whose_stages_do_not_follow_each_other_are_refused(
    name: str, size: int, arguments: dict[str, int]
) -> None:
    backbone = create_backbone(name, (size, size), 3, **arguments)
    with pytest.raises(UserError, match=r"cannot be cut into segments.*use --segments 1"):
        make_encoder(backbone, "pixel", (size, size), segments=2)
    assert make_encoder(backbone, "pixel", (size, size), segments=1).depths == (4,)


def test_a_model_without_stages_is_cut_at_its_blocks() -> None:
    model = build(replace(FASTMIM, model="resmlp_12_224", input_size=(224,), segments=4, decoder_depth=1))
    assert model.encoder.depths == (3, 6, 9, 12)
