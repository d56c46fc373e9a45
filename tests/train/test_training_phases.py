"""A phase goes on with what the one before has learned: weights, moments, all segments."""

from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.factory import build
from leanmim.recipes import FASTMIM_P
from leanmim.schedule import phases
from leanmim.step import make_optimizers, parameter_groups, update
from leanmim.train.training import at_next_size
from tests.helpers import GROWING, batches_of, equal, growing, images_of, in_segments, made, owners_of, throwing

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", GROWING)
def test_a_change_keeps_weights_and_moments(tiny: Pretrain, name: str) -> None:
    config = growing(tiny, name)
    small, large = (phase.config for phase in phases(config))
    torch.manual_seed(0)
    model = build(small)
    optimizers = make_optimizers(model, small)
    (loss,) = model.losses(torch.randn(2, 3, *small.size))
    loss.backward()
    optimizers[0].step()
    larger, after = at_next_size(model, optimizers, large, CPU)
    old, new = dict(model.named_parameters()), dict(larger.named_parameters())
    assert old.keys() == new.keys()
    resized = {key for key in old if old[key].shape != new[key].shape}
    assert all("relative_position" in key or "pos_embed" in key for key in resized)
    assert bool(resized) == (name != "pvt")
    for key in old.keys() - resized:
        assert torch.equal(old[key], new[key]), key
    for key, parameter in new.items():
        before = optimizers[0].state.get(old[key])
        if not before:
            assert parameter not in after[0].state
            continue
        state = after[0].state[parameter]
        assert state["step"] == before["step"] == 1
        assert state["exp_avg"].shape == parameter.shape
        assert (state["exp_avg_sq"] >= 0).all()
        if key not in resized:
            assert torch.equal(state["exp_avg"], before["exp_avg"])
            assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"])
        else:
            assert state["exp_avg"].any()
    (loss,) = larger.losses(torch.randn(2, 3, *large.size))
    loss.backward()
    after[0].step()
    assert loss.isfinite()


def test_the_next_phase_keeps_what_filling_has_learned(tiny: Pretrain) -> None:
    first, second = (phase.config for phase in phases(throwing(tiny)))
    model = build(first)
    optimizers = make_optimizers(model, first)
    (loss,) = model.losses(images_of(first))
    loss.backward()
    optimizers[0].step()
    larger, fresh = at_next_size(model, optimizers, second, torch.device("cpu"))
    learned = {name: value for name, value in model.named_parameters() if "filling" in name}
    assert len(learned) == 8
    for name, parameter in larger.named_parameters():
        if name in learned:
            assert torch.equal(parameter, learned[name])
            assert torch.equal(fresh[0].state[parameter]["exp_avg"], optimizers[0].state[learned[name]]["exp_avg"])
    mask = larger.draw_mask(images_of(second))
    assert larger.draw_splits([mask])[0].thrown.shape == (2, 18)


@pytest.mark.parametrize(("backbone", "masking"), [("vit", "pixel"), ("vit", "drop"), ("swin", "pixel")])
def test_segments_grow_with_their_images(backbone: str, masking: str) -> None:
    """FastMIM-P's phases: norms, tokens, decoders and moments of all segments go along, training goes on."""
    config = replace(
        FASTMIM_P, **{name: value for name, value in asdict(in_segments(backbone, masking, throw=0.3)).items()
                      if name in ("model", "model_kwargs", "input_size", "masking", "mask_ratio", "decoder_width",
                                  "decoder_heads", "throw")},
        segments=4, decoder_depth=1, phase_scales=(1.0, 1.5), phase_starts=(0.0, 0.5), epochs=2,
    )  # fmt: skip
    first, second = (phase.config for phase in phases(config))
    model, optimizers = made(first, rate=1e-3)
    update(model, optimizers, batches_of(first, 0, 1))
    larger, others = at_next_size(model, optimizers, second, torch.device("cpu"))
    assert larger.encoder.grid.n > model.encoder.grid.n
    own, state = model.state_dict(), deepcopy(larger.state_dict())
    for name, value in state.items():
        if not name.startswith("encoder.backbone.") or ("pos_embed" not in name and "relative" not in name):
            assert torch.equal(value, own[name]), name
    places, owners = dict(model.named_parameters()), owners_of(larger)
    for name, parameter in larger.named_parameters():
        if parameter.requires_grad and places[name].shape == parameter.shape:
            i = owners[name]
            assert equal(others[i].state[parameter], optimizers[i].state[places[name]]), name
    assert [len(group) for group in map(list, parameter_groups(larger))] == [2] * 4
    for optimizer in others:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    for step in range(2):
        assert update(larger.train(), others, batches_of(second, step, 1)).isfinite().all()
    assert not equal(larger.state_dict(), state)
