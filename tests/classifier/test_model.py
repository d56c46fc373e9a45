"""timm's classifier from a start."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from leanmim.classifier.groups import decayed_groups
from leanmim.classifier.model import build_classifier, heads, make_classifier
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.start import Start, open_start
from tests.helpers import CONVNEXT, PLAIN, SWIN
from tests.runs import untrained

CLASSES = ("a", "b", "c")
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", PLAIN, {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}),
    "swin": (*SWIN, {"head.fc.weight", "head.fc.bias"}),
    "convnext": (*CONVNEXT, {"head.fc.weight", "head.fc.bias"}),
    "pvt": ("pvt_v2_b0", {}, {"head.weight", "head.bias"}),
    "resnet": ("resnet18", {}, {"fc.weight", "fc.bias"}),
}


def encoder_start(family: str, masked: bool = True) -> Start:
    name, kwargs, _ = FAMILIES[family]
    start = open_start("scratch", model=name, model_kwargs=kwargs, input_size=(64,))
    return replace(start, weights=start.encoder(seed=3).state_dict(), masked=masked, origin="w")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")
def test_all_but_the_head_and_the_norm_after_the_mean_is_the_starts(family: str, size: int) -> None:
    start = encoder_start(family)
    sized = replace(start, model=replace(start.model, input_size=(size,)))
    made = make_classifier(sized, CLASSES)
    assert set(made.fresh) == FAMILIES[family][2]
    assert made.model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert start.weights is not None
    for name, value in made.model.state_dict().items():
        if name not in made.fresh and size == 64:
            assert torch.equal(value, start.weights[name]), name


def test_the_head_is_small_and_the_seed_decides_it() -> None:
    one, other, third = (make_classifier(encoder_start("vit"), CLASSES, seed=seed).model for seed in (0, 0, 1))
    assert one.head.weight.std() < 5e-5 and not one.head.bias.any()
    assert torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.head.weight, third.head.weight)


def test_pooling_of_a_vit() -> None:
    """MIM and nothing: the mean and a fresh norm; other weights: timm's own, the class token and the trained norm."""
    images = torch.randn(2, 3, 64, 64)
    masked = make_classifier(encoder_start("vit"), CLASSES)
    assert masked.architecture.model_kwargs["global_pool"] == "avg"
    tokens = masked.model.eval().forward_features(images)[:, 1:]
    torch.testing.assert_close(masked.model(images), masked.model.head(masked.model.fc_norm(tokens.mean(1))))
    labelled = make_classifier(encoder_start("vit", masked=False), CLASSES)
    assert set(labelled.fresh) == {"head.weight", "head.bias"}
    assert "global_pool" not in labelled.architecture.model_kwargs
    token = make_classifier(encoder_start("vit"), CLASSES, pool="token")
    assert set(token.fresh) == {"head.weight", "head.bias"}
    mean = make_classifier(encoder_start("vit", masked=False), CLASSES, pool="avg")
    assert set(mean.fresh) == FAMILIES["vit"][2]
    with pytest.raises(UserError, match="--pool token: resnet18 has no class token"):
        make_classifier(encoder_start("resnet"), CLASSES, pool="token")


def test_layers_that_pre_training_left_out_are_fresh(tiny: Pretrain) -> None:
    start = open_start(str(untrained(replace(tiny, depth=3))))
    made = make_classifier(start, CLASSES)
    assert len(made.model.blocks) == 4
    assert {name for name in made.fresh if name.startswith("blocks.")} == {
        name for name, _ in made.model.named_parameters() if name.startswith("blocks.3.")
    }


def test_after_fastmim_the_last_norm_of_a_swin_is_fresh_too(tiny_simmim: Pretrain) -> None:
    name, kwargs = SWIN
    for masking, fresh in (("token", False), ("pixel", True)):
        own = replace(
            tiny_simmim,
            model=name,
            model_kwargs=kwargs,
            input_size=(64,),
            mask_unit=32,
            masking=masking,
            out=f"{tiny_simmim.out}-{masking}",
        )
        made = make_classifier(open_start(str(untrained(own))), CLASSES)
        assert ("norm.weight" in made.fresh) == fresh


def test_the_first_segments_of_a_run_are_a_shallower_classifier(tiny: Pretrain) -> None:
    folder = str(untrained(replace(tiny, segments=2)))
    made = make_classifier(open_start(folder, depth=2), CLASSES)
    assert len(made.model.blocks) == 2 and set(made.fresh) == FAMILIES["vit"][2]
    assert decayed_groups(made.model, 0.5)[0]["lr_scale"] == 0.5**3  # of its own depth


def test_the_first_stages_of_a_family_that_timm_builds_whole_only(tiny: Pretrain) -> None:
    own = replace(
        tiny,
        model="convnext_atto",
        model_kwargs={},
        masking="pixel",
        input_size=(64,),
        segments=(2, 4),
        out=tiny.out + "c",
    )
    with pytest.raises(UserError, match="--depth 2: timm does not build convnext_atto shorter"):
        make_classifier(open_start(str(untrained(own)), depth=2), CLASSES)


def test_missing_weights_are_an_error() -> None:
    start = encoder_start("convnext")
    assert start.weights is not None
    lacking = replace(start, weights={k: v for k, v in start.weights.items() if k != "stages.0.blocks.0.gamma"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(stages.0.blocks.0.gamma\)"):
        make_classifier(lacking, CLASSES)


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_a_classifier_is_built_again_and_a_head_for_the_same_classes_is_kept(family: str) -> None:
    made = make_classifier(encoder_start(family), CLASSES)
    start = Start(made.architecture, made.model.state_dict(), [0.5], [0.5], "tuned", classes=CLASSES)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(build_classifier(start)(images), made.model.eval()(images))
    again = make_classifier(start, CLASSES)
    assert not again.fresh
    torch.testing.assert_close(again.model.eval()(images), made.model(images))
    other = make_classifier(start, ("x", "y"))
    assert {name.partition(".")[0] for name in other.fresh} == {heads(made.model)[0].partition(".")[0]}


def test_an_encoder_is_no_classifier(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="leanmim finetune"):
        build_classifier(open_start(str(untrained(tiny))))


def test_scratch_is_timms_own_initialisation() -> None:
    made = make_classifier(
        open_start("scratch", model="vit_tiny_patch16_224", model_kwargs=PLAIN, input_size=(32,)), CLASSES
    )
    assert len(made.fresh) == len(list(made.model.parameters()))
    torch.manual_seed(0)
    own = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, global_pool="avg", img_size=32, drop_path_rate=0.0, **PLAIN
    )
    assert torch.equal(made.model.blocks[0].attn.qkv.weight, own.blocks[0].attn.qkv.weight)


def test_drop_path_rises_to_its_rate(tmp_path: Path) -> None:
    model = make_classifier(encoder_start("vit"), CLASSES, drop_path=0.3).model
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) or 0.0 for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
