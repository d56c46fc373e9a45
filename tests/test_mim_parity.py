"""MAE is MAE: same weights, same mask noise, same numbers as transformers' ViTMAEForPreTraining."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import ViTMAEForPreTraining

from leanmim.config import Export, Pretrain
from leanmim.factory import build
from leanmim.formats import export
from leanmim.masking import random_mask
from leanmim.mim import MIM
from leanmim.recipes import MAE
from leanmim.run import save
from leanmim.targets import patchify

SIZES = {
    "tiny": replace(
        MAE, model="vit_tiny_patch16_224", input_size=(64,), decoder_depth=2, decoder_width=64, decoder_heads=4,
        model_kwargs={"depth": 3},
    ),
    "small": replace(MAE, model="vit_small_patch16_224", input_size=(96,), decoder_depth=4, decoder_width=128, decoder_heads=8),
}  # fmt: skip


def through_export(model: MIM, config: Pretrain) -> ViTMAEForPreTraining:
    """Their model, loaded from our export of ours."""
    Path(config.out).mkdir(exist_ok=True)
    (Path(config.out) / "config.json").write_text("{}")
    state = {"config": config.to_json(), "step": 0, "mean": [0.5] * 3, "std": [0.5] * 3, "model": model.state_dict()}
    save(Path(config.out) / "checkpoints" / "last.pt", state)
    folder = export(Export(run=config.out, format="transformers", overwrite=True))
    theirs, info = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return theirs.train()


@pytest.fixture(params=SIZES)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Pretrain:
    return replace(SIZES[request.param], out=str(tmp_path / "run"), data="none")


@pytest.fixture
def ours(config: Pretrain) -> MIM:
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide a wrong key
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).norm() / theirs.norm()).detach())


def test_loss_predictions_and_gradients_agree(ours: MIM, config: Pretrain) -> None:
    theirs = through_export(ours, config)
    assert theirs.config.norm_pix_loss
    images = torch.randn(3, 3, *config.size)
    noise = torch.rand(3, ours.encoder.grid.n)
    mask = random_mask(noise, ours.encoder.grid, 0.75)

    (loss,) = list(ours.losses(images, [mask]))
    loss.backward()
    expected = theirs(images, noise=noise)
    expected.loss.backward()

    assert relative(loss, expected.loss) < 1e-5
    ((ids, prediction),) = ours.predictions(images, [mask])
    assert torch.equal(torch.zeros(3, ours.encoder.grid.n).scatter(1, ids, 1.0), expected.mask)
    assert relative(prediction, expected.logits.gather(1, ids[..., None].expand_as(prediction))) < 1e-5

    # Our gradients, put in the place of the weights and sent through the export, must be their gradients.
    for parameter in ours.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = dict(through_export(ours, config).named_parameters())
    for name, parameter in theirs.named_parameters():
        if name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
            continue  # fixed here as in the paper
        if "k_proj.bias" in name or "key.bias" in name:
            # a key's bias cancels in the softmax: its gradient is rounding around 0 in both
            assert max(gradients[name].abs().max(), parameter.grad.abs().max()) < 1e-6
        else:
            assert relative(gradients[name], parameter.grad) < 1e-5, name


def test_targets_agree(ours: MIM, config: Pretrain) -> None:
    images = torch.randn(2, 3, *config.size)
    theirs = through_export(ours, config)
    assert torch.equal(patchify(images, 16), theirs.patchify(images))
