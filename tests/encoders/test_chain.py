"""A backbone is run once on an empty image, which teaches it nothing."""

import pytest
import torch
from torch import Tensor, nn

from leanmim.encoders import make_encoder
from leanmim.encoders.backbone import create_backbone
from leanmim.errors import UserError
from tests.families import HEAD_NORM, fastmim


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def test_a_model_can_be_built_without_gradients() -> None:
    """As around `leanmim.load_backbone` in an evaluation."""
    with torch.no_grad():
        model = fastmim("convnext_atto")
    trained = {key for key, parameter in model.encoder.backbone.named_parameters() if parameter.requires_grad}
    everything = {key for key, _ in model.encoder.backbone.named_parameters()}
    assert everything - trained == set(HEAD_NORM)


def test_building_teaches_the_running_statistics_nothing() -> None:
    backbone = create_backbone("resnet18", (64, 96), 3)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    make_encoder(backbone, "pixel", (64, 96))
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


class TwoGrids(nn.Module):
    """A backbone whose features are two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, 16)

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.stem(images), self.stem(images)


def test_features_that_are_several_grids_cannot_be_read() -> None:
    with pytest.raises(UserError, match="TwoGrids cannot be masked in pixel space: its features are not one grid"):
        make_encoder(TwoGrids(), "pixel", (64, 96))
