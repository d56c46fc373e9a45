"""FastMIM-P: the input size grows during training, and nothing that was learned is lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from leanmim.checkpoint import Run, carry_over, load, load_backbone, restore
from leanmim.config import Pretrain
from leanmim.cost import count, count_stage
from leanmim.decoder import sincos
from leanmim.errors import UserError
from leanmim.mim import build
from leanmim.recipes import FASTMIM_P
from leanmim.schedule import stages
from leanmim.step import make_optimizers
from leanmim.train import at_next_size, pretrain

CPU = torch.device("cpu")
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24}, 64),
    "pvt": ("pvt_v2_b0", {}, 64),
}


def growing(tiny: Pretrain, name: str = "vit", **changes: object) -> Pretrain:
    """Two stages; the second half twice as large, in smaller batches."""
    model, arguments, size = MODELS[name]
    config = replace(
        FASTMIM_P,
        **{key: getattr(tiny, key) for key in ("data", "out", "workers", "device", "log_every")},
        model=model,
        model_kwargs=arguments,
        input_size=(size,),
        hog_cell=4,
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
        epochs=4,
        blr=1e-2,
        batch_size=8,
        stage_scales=(1.0, 2.0),
        stage_starts=(0.0, 0.5),
        stage_batches=(8, 4),
        stage_accums=(1, 2),
    )
    return replace(config, **changes)


def test_the_recipe_is_128_160_192_at_0_50_80_percent() -> None:
    table = stages(replace(FASTMIM_P, epochs=100))
    assert [(stage.start, stage.stop, stage.config.size) for stage in table] == [
        (0, 50, (128, 128)), (50, 80, (160, 160)), (80, 100, (192, 192)),
    ]  # fmt: skip
    assert not any(stage.config.stage_scales for stage in table)


def test_one_stage_unless_there_are_more(tiny: Pretrain) -> None:
    ((start, stop, config),) = stages(tiny)
    assert (start, stop, config) == (0, tiny.epochs, tiny)


def test_sizes_need_not_be_square() -> None:
    table = stages(replace(FASTMIM_P, input_size=(128, 256), epochs=10))
    assert [stage.config.size for stage in table] == [(128, 256), (160, 320), (192, 384)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage_starts": (0.0,)}, "1 numbers for 2"),
        ({"stage_starts": (0.1, 0.5)}, "begin with 0"),
        ({"stage_starts": (0.0, 1.0)}, "stay under 1"),
        ({"stage_batches": (8,)}, "--stage-batches"),
        ({"stage_accums": (1, 0)}, "--stage-accums"),
        ({"epochs": 1}, "too few for stages"),
        ({"stage_scales": (1.0, 1.1)}, "not divided by"),
        ({"stage_batches": (8, 64)}, "choose --batch-size"),
        ({"batch_size": "auto"}, "leave those of the stages out"),
    ],
)
def test_what_cannot_be(tiny: Pretrain, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(growing(tiny, **wrong))
    assert not Path(tiny.out).exists()


def test_each_stage_has_its_size_batch_and_rate(tiny: Pretrain) -> None:
    pretrain(growing(tiny, stage_blrs=(1e-2, 3e-2)))
    lines = [json.loads(line) for line in Run(Path(tiny.out)).metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9)]  # 16 images: 2 steps of 8 an epoch, either way
    assert [line["epoch"] for line in lines] == [0.5 * step for step in range(1, 9)]
    quarter = [line["lr"] for line in lines]
    assert quarter[4] / quarter[3] > 1.5  # three times the base rate, at half the cosine
    config, model, _ = restore(tiny.out)
    assert config.size == (64, 64)
    assert model.encoder.grid == (8, 8)


@pytest.mark.parametrize("name", MODELS)
def test_a_change_keeps_weights_and_moments(tiny: Pretrain, name: str) -> None:
    config = growing(tiny, name)
    small, large = (stage.config for stage in stages(config))
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


def test_the_loss_goes_on_where_it_was(tiny: Pretrain) -> None:
    """The same images at twice the size: a model that has learned does better than one that has not, at once."""
    config = growing(tiny, epochs=40, stage_starts=(0.0, 0.9), stage_scales=(1.0, 2.0), blr=2e-2)
    pretrain(config)
    lines = [json.loads(line) for line in Run(Path(tiny.out)).metrics.read_text().splitlines()]
    first, last, after = lines[0]["loss"], lines[71]["loss"], lines[72]["loss"]
    assert last < first
    assert after - last < 0.5 * (first - last)


def test_sine_cosine_positions_are_computed_and_learned_ones_resized(tiny: Pretrain) -> None:
    small, large = (stage.config for stage in stages(growing(tiny)))
    old, new = build(small).encoder, build(large).encoder
    carry_over(old, new)
    assert torch.equal(new.backbone.pos_embed[0, 1:], sincos(new.grid, 32))
    old.backbone.pos_embed.data.fill_(0.25)
    carry_over(old, new)
    assert torch.allclose(new.backbone.pos_embed, torch.tensor(0.25))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_stopped_in_any_stage_and_continued_ends_alike(
    tiny: Pretrain, tmp_path: Path, name: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 4 are the first stage, 5 to 8 the second; 4 is its border."""
    if name != "vit" and stop != 5:
        pytest.skip("one family is enough for every place")
    config = growing(tiny, name, checkpoint_minutes=0.0)
    pretrain(config)
    whole = load(Run(Path(config.out)).last)

    class Stopped(Exception):
        pass

    import leanmim.train as train

    save = train.save

    def save_and_stop(path: Path, state: dict) -> None:
        save(path, state)
        if state["step"] == stop:
            raise Stopped

    config = replace(config, out=str(tmp_path / "other"))
    monkeypatch.setattr(train, "save", save_and_stop)
    with pytest.raises(Stopped):
        pretrain(config)
    monkeypatch.setattr(train, "save", save)
    pretrain(config)
    again = load(Run(Path(config.out)).last)
    assert again["step"] == whole["step"] == 8
    assert all(torch.equal(value, again["model"][key]) for key, value in whole["model"].items())
    for key, value in whole["optimizers"][0]["state"].items():
        assert all(torch.equal(value[part], again["optimizers"][0]["state"][key][part]) for part in value)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_out_loads_in_timm_at_its_size_and_a_larger_one(tiny: Pretrain, name: str) -> None:
    pretrain(growing(tiny, name))
    config, model, state = restore(tiny.out)
    assert state["stage"] == 1
    backbone, _, _ = load_backbone(tiny.out, (128, 128))
    assert backbone.forward_features(torch.randn(1, 3, 128, 128)).isfinite().all()
    file = Path(tiny.out) / "export" / "timm" / "model.safetensors"
    arguments = json.loads((file.parent / "config.json").read_text())["model_args"]
    loaded = timm.create_model(config.model, num_classes=0, checkpoint_path=str(file), **arguments).eval()
    images = torch.randn(2, 3, *config.size)
    assert torch.equal(loaded.forward_features(images), model.eval().encoder.backbone.forward_features(images))
    # a size of one's own, window tables and positions resized by timm
    size = {"img_size": 96} if name != "pvt" else {}
    other = timm.create_model(
        config.model, pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(file=str(file), num_classes=0),
        **{**arguments, **size},
    )  # fmt: skip
    assert other(torch.randn(1, 3, 96, 96)).shape == (1, 5)


def test_the_cost_is_that_of_the_largest_stage_and_the_mean_of_the_flops(tiny: Pretrain) -> None:
    config = growing(tiny)
    cost, flops = count(config)
    first, second = (count_stage(stage.config) for stage in stages(config))
    assert cost.peak_bytes == max(first[0].peak_bytes, second[0].peak_bytes)
    assert flops["training"]["encoder"] == round(
        (first[1]["training"]["encoder"] + second[1]["training"]["encoder"]) / 2
    )
    assert cost.train_flops_per_image == sum(flops["training"].values())
