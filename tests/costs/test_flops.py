"""FLOPs against hand counts; the same on every device and under every version of torch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from leanmim.costs import count
from leanmim.costs.flops import FORMULAS, NoneUncounted, flop_counter
from leanmim.decoder import Decoder
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.mim import MIM
from leanmim.recipes import FASTMIM, MAE, SIMMIM
from tests.costs.small import SMALL


def test_flops_of_mae_vit_b_are_the_hand_count() -> None:
    """METHODS: 9.78 GMAC, encoder 4.41, decoder 5.37; ours embeds the 49 visible patches and predicts the 147 masked ones
    only, not all 196.
    """
    cost, flops = count(replace(MAE, model="vit_base_patch16_224", batch_size=2, precision="fp32"))

    def layers(tokens: int, width: int) -> int:
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    encoder = 49 * 768 * 768 + 12 * layers(50, 768)
    decoder = 50 * 768 * 512 + 8 * layers(197, 512) + 147 * 512 * 768
    assert flops["forward"] == {"encoder": 2 * encoder, "decoder": 2 * decoder, "target": 0}
    assert cost.forward_flops_per_image == 2 * (encoder + decoder)
    assert (encoder + 147 * 768 * 768) / 1e9 == pytest.approx(4.41, abs=0.005)
    assert (decoder + 49 * 512 * 768) / 1e9 == pytest.approx(5.37, abs=0.005)
    assert (cost.encoder_tokens, cost.decoder_tokens) == (50, 197)


def hooked_macs(model: MIM, images: Tensor) -> int:
    """An independent count: every linear layer and convolution by its shapes, every window attention by hand."""
    macs = 0

    def linear(module: nn.Linear, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs
        macs += out.numel() * module.in_features

    def convolution(module: nn.Conv2d, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs
        macs += out.numel() * module.weight[0].numel()

    def attention(module: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal macs
        windows, tokens, width = arguments[0].shape
        macs += 2 * windows * tokens**2 * width

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif type(module).__name__ == "WindowAttention":
            module.register_forward_hook(attention)
    with torch.no_grad():
        list(model.losses(images))
    return macs


def test_flops_of_swin_t_agree_with_an_independent_count() -> None:
    config = replace(SIMMIM, model="swin_tiny_patch4_window7_224", input_size=(224,), batch_size=1, precision="fp32")
    macs = hooked_macs(build(config), torch.randn(1, 3, 224, 224))
    cost, flops = count(config)
    assert cost.forward_flops_per_image == 2 * macs
    assert flops["forward"]["encoder"] / 2e9 == pytest.approx(4.4, abs=0.15)  # published: 4.5 GMAC


MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("drop", 32, {"model_kwargs": {"depth": 1}}),
    "vit_tiny_patch16_224, heads of 20": ("drop", 32, {"model_kwargs": {"depth": 1, "embed_dim": 60}}),
    "swin_tiny_patch4_window7_224": ("pixel", 64, {"depth": 2}),
    "swinv2_tiny_window8_256": ("pixel", 64, {"depth": 2}),
    "pvt_v2_b0": ("pixel", 64, {"depth": 2}),
    "convnext_atto": ("pixel", 64, {"depth": 2}),
    "mvitv2_tiny": ("pixel", 64, {"depth": 2}),
    "cait_xxs24_224": ("pixel", 32, {"model_kwargs": {"depth": 1}}),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_the_same_on_every_device(name: str) -> None:
    masking, size, shallow = MODELS[name]
    config = replace(
        FASTMIM, model=name.partition(",")[0], masking=masking, input_size=(size,), decoder_depth=1,
        decoder_width=32, decoder_heads=2, batch_size=1, **shallow,
    )  # fmt: skip
    precisions = ("bf16", "fp32") if name.startswith("vit") else ("bf16",)  # two kernels on CUDA
    _, cpu = count(replace(config, precision="fp32"))
    assert all(count(replace(config, precision=precision), "cuda")[1] == cpu for precision in precisions)
    assert min(cpu["forward"]["encoder"], cpu["forward"]["decoder"]) > 0


def test_flops_do_not_depend_on_the_formulas_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL["mae-vit"], batch_size=1, precision="fp32")
    found = []
    for formula in (None, lambda *arguments, **_: 1):
        for operator in FORMULAS:
            if formula is None:
                monkeypatch.delitem(flop_registry, operator, raising=False)
            else:
                monkeypatch.setitem(flop_registry, operator, formula)
        found.append(count(config)[1])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("convolution", "shape", "forward"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 10, 10), 2 * 2 * 100 * 8 * 6 * 9),
        (nn.Conv2d(8, 8, 7, padding=3, groups=8), (2, 8, 10, 10), 2 * 2 * 100 * 8 * 49),
        (nn.Conv2d(6, 8, 4, stride=4), (2, 6, 16, 16), 2 * 2 * 16 * 8 * 6 * 16),
        (nn.ConvTranspose2d(6, 8, 2, stride=2), (2, 6, 5, 5), 2 * 2 * 25 * 6 * 8 * 4),
    ],
    ids=["plain", "depthwise", "strided", "transposed"],
)
@pytest.mark.parametrize("asked", [1, 2])
def test_each_gradient_of_a_convolution_costs_its_forward_pass(
    convolution: nn.Module, shape: tuple[int, ...], forward: int, asked: int
) -> None:
    images = torch.randn(shape, requires_grad=asked == 2)
    with flop_counter() as counter:
        out = convolution(images)
    assert counter.get_total_flops() == forward
    with flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == asked * forward


@pytest.fixture
def my_matmul() -> Iterator[Any]:
    """An operator that multiplies matrices, of which torch's counter knows nothing."""
    library = torch.library.Library("leanmim_test", "DEF")
    library.define("my_matmul(Tensor a, Tensor b) -> Tensor")
    library.impl("my_matmul", lambda a, b: torch.matmul(a, b), "CompositeExplicitAutograd")
    yield torch.ops.leanmim_test.my_matmul
    library._destroy()


def test_an_uncounted_matrix_product_is_an_error(my_matmul: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Decoder.forward

    def with_another_product(self: Decoder, tokens: Tensor, *arguments: Any) -> Any:
        with torch.no_grad():
            my_matmul(tokens, tokens.mT)
        return forward(self, tokens, *arguments)

    monkeypatch.setattr(Decoder, "forward", with_another_product)
    with pytest.raises(UserError, match=r"no FLOP count for leanmim_test\.my_matmul, which multiplies matrices"):
        count(replace(SMALL["mae-vit"], batch_size=1))


def test_operators_that_only_sound_like_it_are_counted_as_nothing() -> None:
    images, places = torch.rand(1, 3, 8, 8), torch.zeros(1, 4, 4, 2)
    counter = flop_counter()
    with NoneUncounted(counter), counter:
        nn.functional.interpolate(images, scale_factor=2, mode="bilinear", antialias=True)
        nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
        nn.functional.interpolate(images, scale_factor=2, mode="bicubic")
        nn.functional.grid_sample(images, places, align_corners=False)
        images.add(1).mul(2).softmax(1)
    assert counter.get_total_flops() == 0


def test_known_matrix_products_are_counted() -> None:
    counter = flop_counter()
    with NoneUncounted(counter), counter:
        torch.rand(2, 3) @ torch.rand(3, 5)
        nn.functional.conv2d(torch.rand(1, 3, 4, 4), torch.rand(7, 3, 2, 2))
    assert counter.get_total_flops() == 2 * (2 * 3 * 5 + 7 * 3 * 3 * 3 * 2 * 2)
