"""Starting from the weights of a file or a run; a run's backbone at another size."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.recipes import SIMMIM
from leanmim.weights import initialise, load_backbone, restore
from tests.helpers import fake_run


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own, while it resizes the tables
def test_the_readmes_swin_goes_to_another_size(tiny: Pretrain) -> None:
    swin = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(128,))
    run = fake_run(replace(SIMMIM, data=tiny.data, **swin), Path(tiny.out))
    small, _, _ = load_backbone(run.out)
    large, _, _ = load_backbone(run.out, (224, 224))
    assert small.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == 7**2
    assert large.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == 13**2
    assert large(torch.randn(1, 3, 224, 224)).shape == (1, 192)


def test_start_from_a_timm_file(tiny: Pretrain, tmp_path: Path) -> None:
    """A classifier's checkpoint of another size: head left, positions resized, everything else taken."""
    other = timm.create_model(tiny.model, num_classes=5, img_size=64, **tiny.model_kwargs)
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    model = build(tiny)
    assert "encoder from" in initialise(model, str(tmp_path / "timm.safetensors"))
    own = model.encoder.backbone.state_dict()
    for name, value in other.state_dict().items():
        if not name.startswith("head"):
            assert name == "pos_embed" or torch.equal(own[name], value), name
    assert own["pos_embed"].shape[1] == 17

    torch.save({"state_dict": other.state_dict()}, tmp_path / "timm.pth")
    again = build(tiny)
    initialise(again, str(tmp_path / "timm.pth"))
    assert torch.equal(again.encoder.backbone.state_dict()["norm.weight"], own["norm.weight"])


def test_start_from_a_run_takes_the_decoder_where_it_fits(tiny: Pretrain) -> None:
    run = fake_run(tiny, Path(tiny.out))
    _, trained, _ = restore(run.out)
    for source in (run.out, str(Path(run.out) / "checkpoints" / "last.pt")):
        model = build(tiny)
        assert "encoder and decoder" in initialise(model, source)
        for name, value in trained.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
    smaller = build(replace(tiny, decoder_width=16))
    assert "its decoder has another shape" in initialise(smaller, run.out)
    assert torch.equal(smaller.encoder.backbone.norm.weight, trained.encoder.backbone.norm.weight)


def test_weights_of_another_model_are_refused(tiny: Pretrain, tmp_path: Path) -> None:
    model = build(tiny)
    other = timm.create_model(tiny.model, num_classes=0, img_size=32, **{**tiny.model_kwargs, "depth": 5})
    save_file(other.state_dict(), tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match=r"12 weights that the model has not.*blocks\.4.*--model-kwargs"):
        initialise(model, str(tmp_path / "deep.safetensors"))
    wide = timm.create_model(tiny.model, num_classes=0, img_size=32, **{**tiny.model_kwargs, "embed_dim": 64})
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="another shape"):
        initialise(model, str(tmp_path / "wide.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        initialise(model, str(tmp_path / "broken.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        initialise(model, str(tmp_path / "nowhere.pth"))
