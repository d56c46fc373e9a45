"""What `leanmim pretrain` refuses: one message, and nothing written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leanmim.config import Pretrain
from tests.runs import Refused, arguments, contents, untrained

SWIN = "swin_tiny_patch4_window7_224"


def bad(*named: str, **options: Any) -> Any:
    return pytest.param(options, named, id=" ".join(options) + " " + "-".join(str(v) for v in options.values())[:40])


BAD = [
    bad("'empty'", "no files", "png", data="empty"),
    bad("'texts'", "2 files but no images", "png", data="texts"),
    bad("'nowhere'", "give a folder of images", data="nowhere"),
    bad("1 of 1 lines of 'texts/a.txt' name no file", "relative to", data="texts/a.txt"),
    bad("'foreign.pt' is a file", "give a folder of images", data="foreign.pt"),
    bad("--data is needed", data=""),
    bad("'vit_tinny_patch16_224'", "nearest: ", "vit_tiny_patch16_224", model="vit_tinny_patch16_224"),
    bad("nearest: none", "timm.list_models()", model="qqqqqqqq"),
    bad("batch of 17", "16 in", "--batch-size 16 or smaller", batch_size=17),
    bad("batch of 32", "accum 8", "--batch-size 2 or smaller", accum=8),
    bad("--input-size 36 is", "patch of 8 px", "try 32", input_size=(36,)),
    bad("--input-size 32 44", "patch of 8 px", "try 32 40", input_size=(32, 44)),
    bad("--input-size takes one number or two", input_size=(32, 32, 32)),
    bad("--input-size 0", "at least 1", input_size=(0,)),
    bad("--masking drop", "SwinTransformer", "it can do: token", "simmim", model=SWIN, model_kwargs={"embed_dim": 24}),
    bad("ResNet", "--masking drop", "leanmim pretrain fastmim", model="resnet18", model_kwargs={}),
    bad("ResNet", "--masking token", "it can do: pixel", model="resnet18", model_kwargs={}, masking="token"),
    bad("foo", "--model-kwargs", model_kwargs={"foo": 3}),
    bad("cannot build", "--model-kwargs embed_dim 33 num_heads 2", model_kwargs={"embed_dim": 33, "num_heads": 2}),
    bad("no --masking 'blocks'", "drop, token, pixel", masking="blocks"),
    bad("no --target 'sobel'", "pixels, raw-pixels, hog", target="sobel"),
    bad("--mask-unit 12", "patch of 8 px", "try 16", mask_unit=12),
    bad("3 x 3 patches does not divide the grid of 4 x 4", "--mask-unit", mask_unit=24),
    bad("--mask-ratio 0.0 masks 0 of 16 units", "between 0.0625 and 0.9375", mask_ratio=0.0),
    bad("--mask-ratio 0.99 masks 16 of 16 units", "between 0.0625 and 0.9375", mask_ratio=0.99),
    bad("--mask-ratio 1.5", "at most 1", mask_ratio=1.5),
    bad("--mask-ratio nan", "at least 0", mask_ratio=float("nan")),
    bad("--decoder-depth 0", "--masking token", decoder_depth=0),
    bad("--decoder-width 30", "multiple of 4", decoder_width=30),
    bad("--decoder-width 0", "at least 4", decoder_width=0),
    bad("--decoder-heads 0", "at least 1", decoder_heads=0),
    bad("--epochs 0", "at least 1", epochs=0),
    bad("--warmup-epochs 9.0", "2 epochs", warmup_epochs=9.0),
    bad("--crop-scale 0.9 0.2", "low <= high <= 1", crop_scale=(0.9, 0.2)),
    bad("--mean has 2 numbers for 3 channels", "one for each", mean=(0.5, 0.5), std=(0.2, 0.2)),
    bad("--mean and --std together", mean=(0.5, 0.5, 0.5)),
    bad("--mean 128.0 128.0 128.0", "divide", "255", mean=(128.0,) * 3, std=(64.0,) * 3),
    bad("--mean 0.5 nan 0.5", "between 0 and 1", mean=(0.5, float("nan"), 0.5), std=(0.2, 0.2, 0.2)),
    bad("--std 0.2 0.2 0.0", "--std above 0", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.0)),
    bad("'nowhere'", "--init", init="nowhere"),
    bad("'texts/a.jpg.pt'", "damaged or not a checkpoint", init="texts/a.jpg.pt"),
    bad("'foreign.pt'", "does not fit the model", "--model-kwargs", init="foreign.pt"),
    bad("'foreign.pth'", "does not fit the model", "--model-kwargs", init="foreign.pth"),
    bad("'empty' holds no files", "leanmim reads", knn_data="empty"),
]


if not torch.cuda.is_available():
    BAD.append(bad("--device cuda", "use --device cpu", device="cuda"))


@pytest.mark.parametrize(("options", "named"), BAD)
def test_bad_input_to_pretrain(
    options: dict[str, Any], named: tuple[str, ...], tiny: Pretrain, clutter: Path, refused: Refused
) -> None:
    wrong = replace(tiny, **options)
    message = refused(arguments(wrong))
    assert all(word in message for word in named), message
    assert not Path(tiny.out).exists()

    # nor does --overwrite destroy anything before all is well
    before = contents(untrained(tiny))
    assert refused(arguments(replace(wrong, overwrite=True))) == message
    assert contents(Path(tiny.out)) == before
