"""What block-wise training and offloading save."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmim.cli import main
from leanmim.config import Cost
from leanmim.costs import StepCost, cost, count
from leanmim.costs.counting import follow_all, watched, with_state
from leanmim.costs.flops import flop_counter
from leanmim.encoders.backbone import backbone_of
from leanmim.factory import build
from leanmim.fake import fake_tensors
from leanmim.mim import Part
from leanmim.pipeline import balanced
from leanmim.recipes import BIM, MAE
from leanmim.step import make_optimizers, update
from tests.helpers import PLAIN, in_segments


def counted(device: str = "cpu", depth: int = 8, **changes: Any) -> tuple[StepCost, Any]:
    arguments = {"patch_size": 8, "embed_dim": 64, "depth": depth, "num_heads": 2}
    config = replace(
        MAE, model="vit_tiny_patch16_224", model_kwargs=arguments, input_size=(64,), decoder_width=64, decoder_heads=2,
        batch_size=8, **changes,
    )  # fmt: skip
    return count(config, device)


def test_four_segments_hold_a_quarter_of_what_mae_holds() -> None:
    mae, _ = counted(decoder_depth=8)
    bim, _ = counted(segments=4, decoder_depth=2)
    assert bim.saved_bytes < 0.31 * mae.saved_bytes
    assert bim.gradient_bytes < 0.3 * mae.gradient_bytes
    assert bim.encoder_parameters == mae.encoder_parameters + 3 * 2 * 64  # a norm at each border
    recipe, flops = counted(segments=BIM.segments, mask_ratio=BIM.mask_ratio, decoder_depth=1)
    assert sum(recipe.segment_flops) == flops["training"]["encoder"] + flops["training"]["decoder"]
    assert list(recipe.segment_flops) == sorted(recipe.segment_flops, reverse=True)  # later ones see less
    assert recipe.saved_bytes < 0.25 * mae.saved_bytes and recipe.train_flops_per_image < mae.train_flops_per_image


def test_offloading_leaves_two_segments_of_all_on_the_device() -> None:
    all_here, flops = counted("cuda", 4, segments=4, decoder_depth=1)
    four, same = counted("cuda", 4, segments=4, decoder_depth=1, offload=True)
    eight, _ = counted("cuda", 8, segments=8, decoder_depth=1, offload=True)
    for found, low, high in ((all_here, 0.99, 1.03), (four, 0.5, 0.56), (eight, 0.25, 0.3)):
        parameters = 4 * (found.encoder_parameters + found.decoder_parameters)  # bytes
        assert low < found.weight_bytes / parameters < high
        assert low < found.optimizer_bytes / (2 * parameters) < high
    assert four.peak_bytes < all_here.peak_bytes
    assert four.gradient_bytes == all_here.gradient_bytes
    assert same == flops


def test_each_further_batch_waits_at_the_border_of_segments() -> None:
    """Its target and its activations."""
    config = in_segments(segments=2, mask_ratio=0.5, offload=True, model_kwargs={**PLAIN, "depth": 2}, precision="fp32")
    two, nine = (count(replace(config, accum=accum), "cuda")[0].peak_bytes for accum in (2, 9))
    assert 1 < (nine - two) / 7 / (4 * 16 * 192 * 4) < 1.5  # images, patches, values, bytes


def test_offloading_is_a_switch_and_says_where_it_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("cost", "bim:offload=True", "--model", "vit_tiny_patch16_224", "--model-kwargs", "depth", "4",
             "--input-size", "64", "--batch-size", "2")  # fmt: skip
    nothing = "nothing to offload: cpu has no memory of its own"
    main([*words, "--device", "cpu"])
    assert nothing in capsys.readouterr().out
    main([*words, "--device", "cuda"])
    assert nothing not in capsys.readouterr().out


def test_beside_a_recipe_in_segments_one_without_is_not_offloaded() -> None:
    two = Cost(recipes=("mae", "bim:offload=True"), model="vit_tiny_patch16_224", model_kwargs={"depth": 4},
               input_size=(64,), batch_size=2, device="cuda", json=True)  # fmt: skip
    mae, bim = json.loads(cost(two))
    alone = json.loads(cost(replace(two, recipes=("mae",))))[0]
    assert mae == alone and bim["weight_bytes"] < mae["weight_bytes"]


@pytest.mark.parametrize("world", [2, 4])
def test_a_process_of_a_pipeline_needs_no_more_than_is_counted(world: int) -> None:
    """Counted here: the step of each process, on fake tensors, with no weights but its own."""
    config = in_segments(batch_size=8)
    whole, _ = count(config)
    predicted = whole.piped(world, 1)
    found = []
    backbone = backbone_of(config, config.depth, device="meta")
    with fake_tensors():
        model = build(config, backbone.to_empty(device="cpu")).train()
        optimizers = with_state(make_optimizers(model, config), model)
        images, features = torch.empty(8, 3, *config.size), [torch.empty(0)]
        weights = {p: p.data for p in model.parameters()}
        for part in balanced(whole.segment_flops, world):
            for parameter, data in weights.items():
                parameter.data = data
            states = [dict(optimizer.state) for optimizer in optimizers]
            for i, optimizer in enumerate(optimizers):
                if i not in part:
                    optimizer.state.clear()
                    for parameter in model.parameters_of(i):
                        parameter.data = parameter.data.new_empty(0)

            def losses(images: Tensor, part: range = part) -> Any:
                def enter(images: Tensor) -> Tensor:
                    return features[0] if part.start else images

                return model.losses(images, part=Part(part, enter, lambda x: features.__setitem__(0, x)))

            storages = follow_all(model, optimizers, False)
            with watched(model, storages, flop_counter(), False):
                update(losses, optimizers[part.start : part.stop], [images.clone()], average=False)
            found.append((storages.peak["weights"], storages.peak["optimizer"], storages.peak["all"]))
            for optimizer, state in zip(optimizers, states, strict=True):
                optimizer.state.update(state)
    for kind, most in zip(("weight_bytes", "optimizer_bytes", "peak_bytes"), map(max, *found), strict=True):
        assert most <= 1.01 * getattr(predicted, kind) < 1.01 * getattr(whole, kind)
    assert max(weight for weight, *_ in found) > 0.9 * predicted.weight_bytes
