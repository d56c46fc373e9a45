"""The cost of a step, counted on fake tensors, against hand counts and against real allocations."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from leanmim.cli import main
from leanmim.config import Cost, Pretrain
from leanmim.cost import count, table
from leanmim.data import Normalise
from leanmim.errors import UserError
from leanmim.mim import MIM, build
from leanmim.recipes import MAE, RECIPES, SIMMIM, variant
from leanmim.step import make_optimizers, update

KEYS = (
    "recipe model batch_size forward_flops_per_image train_flops_per_image encoder_parameters decoder_parameters "
    "weight_bytes gradient_bytes optimizer_bytes saved_bytes transient_bytes peak_bytes encoder_tokens decoder_tokens"
)


def test_flops_of_mae_vit_b_are_the_hand_count() -> None:
    """METHODS: 9.78 GMAC, encoder 4.41, decoder 5.37; ours predicts the 147 masked patches only, not all 196."""
    cost, flops = count(replace(MAE, model="vit_base_patch16_224", batch_size=2, precision="fp32"))

    def layers(tokens: int, width: int) -> int:
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    encoder = 196 * 768 * 768 + 12 * layers(50, 768)
    decoder = 50 * 768 * 512 + 8 * layers(197, 512) + 147 * 512 * 768
    assert flops["forward"] == {"encoder": 2 * encoder, "decoder": 2 * decoder, "target": 0}
    assert cost.forward_flops_per_image == 2 * (encoder + decoder)
    assert encoder / 1e9 == pytest.approx(4.41, abs=0.005)
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


def real_step(config: Pretrain) -> tuple[Callable[[Callable | None], None], MIM]:
    """One real step, with the optimizer's state already there."""
    model = build(config).train()
    model.autocast = torch.bfloat16 if config.precision == "bf16" else None
    optimizers = make_optimizers(model, config)
    normalise = Normalise([0.5] * 3, [0.5] * 3, torch.device("cpu"))
    images = torch.randint(0, 255, (int(config.batch_size), 3, *config.size), dtype=torch.uint8)

    def batches() -> Iterator[Tensor]:
        for _ in range(config.accum):
            read = images.clone()
            yield normalise(read)

    def step(losses: Callable | None = None) -> None:
        update(losses or model, optimizers, batches(), config.accum, config.clip_grad)

    step()
    return step, model


def allocated_peak(step: Callable[[], None]) -> int:
    """Bytes above the start at the peak, by every allocation and release of torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak


def saved_on_real_tensors(step: Callable, model: MIM) -> int:
    """Bytes that autograd holds when the forward pass ends, each storage once, weights aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    most = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def losses(images: Tensor) -> Iterator[Tensor]:
        nonlocal most
        for loss in model(images):
            most = max(most, sum(sizes.values()))
            yield loss
            sizes.clear()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(losses)
    return most


SMALL = {
    "mae-vit": replace(MAE, model="vit_tiny_patch16_224", model_kwargs={"depth": 3}, decoder_depth=2, input_size=(96,)),
    "simmim-vit": replace(SIMMIM, model="vit_tiny_patch16_224", model_kwargs={"depth": 3}, input_size=(96,)),
    "simmim-swin": replace(
        SIMMIM, model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(128,)
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_prediction_is_what_is_allocated(name: str, accum: int, precision: str) -> None:
    config = replace(SMALL[name], batch_size=8, accum=accum, precision=precision)
    cost, _ = count(config)
    step, model = real_step(config)
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    assert cost.weight_bytes == weights
    assert cost.peak_bytes == pytest.approx(weights + cost.optimizer_bytes + allocated_peak(step), rel=0.1)
    assert cost.saved_bytes == pytest.approx(saved_on_real_tensors(step, model), rel=0.03)


def test_weights_gradients_and_state_are_what_adamw_needs() -> None:
    config = replace(SMALL["mae-vit"], batch_size=2, precision="fp32")
    cost, _ = count(config)
    model = build(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = sum(p.requires_grad for p in model.parameters())
    assert cost.encoder_parameters + cost.decoder_parameters == sum(p.numel() for p in model.parameters())
    assert cost.gradient_bytes == 4 * trained
    assert cost.optimizer_bytes == 8 * trained + 4 * tensors  # two moments, and a step count each
    assert cost.peak_bytes > cost.weight_bytes + cost.optimizer_bytes + cost.saved_bytes


def test_bytes_grow_with_the_batch_and_flops_do_not() -> None:
    one, two = (count(replace(SMALL["mae-vit"], batch_size=size, precision="fp32"))[0] for size in (4, 8))
    assert one.train_flops_per_image == two.train_flops_per_image
    assert two.saved_bytes == pytest.approx(2 * one.saved_bytes, rel=0.01)
    assert one.weight_bytes == two.weight_bytes


def test_bf16_on_cuda_keeps_more_than_on_the_cpu_and_less_than_fp32() -> None:
    """CUDA's autocast computes layer norms in float32, the CPU's does not."""
    cpu, cuda, full = (
        count(replace(SMALL["mae-vit"], batch_size=64, precision=precision), device)[0].saved_bytes
        for precision, device in (("bf16", "cpu"), ("bf16", "cuda"), ("fp32", "cuda"))
    )
    assert cpu < cuda < full


def test_a_huge_model_takes_no_memory_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    cost, _ = count(replace(MAE, model="vit_huge_patch14_224", batch_size=256, precision="bf16"), "cuda")
    assert cost.peak_bytes > 40 * 2**30
    assert torch.equal(torch.get_rng_state(), state)


def test_counting_does_not_disturb_training(tiny: Pretrain) -> None:
    """Position tables are cached; none may stay fake."""
    count(tiny)
    torch.manual_seed(0)
    (loss,) = build(tiny).losses(torch.randn(2, 3, 32, 32))
    loss.backward()
    assert type(loss) is Tensor
    assert loss.isfinite()


def test_json_has_one_object_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "cost",
            "simmim",
            "mae",
            "--model",
            "vit_tiny_patch16_224",
            "--input-size",
            "64",
            "--batch-size",
            "4",
            "--json",
        ]
    )
    entries = json.loads(capsys.readouterr().out)
    assert [entry["recipe"] for entry in entries] == ["simmim", "mae"]
    assert all(list(entry) == KEYS.split() for entry in entries)
    assert all(entry["batch_size"] == 4 for entry in entries)


def test_the_table_compares_with_the_first() -> None:
    pairs = [count(replace(SMALL[name], batch_size=2, precision="fp32")) for name in ("mae-vit", "simmim-vit")]
    text = table([cost for cost, _ in pairs], [flops for _, flops in pairs])
    ratio = pairs[1][0].saved_bytes / pairs[0][0].saved_bytes
    (line,) = (line for line in text.splitlines() if "saved for backward" in line)
    assert line.rstrip().endswith(f"({ratio:4.2f})")


def test_changes_reach_every_recipe() -> None:
    changed = Cost(model="vit_tiny_patch16_224", mask_ratio=0.5, batch_size=8)
    for name, recipe in RECIPES.items():
        got = variant(name, changed)
        assert (got.mask_ratio, got.batch_size, got.model) == (0.5, 8, "vit_tiny_patch16_224")
        assert got.input_size == recipe.input_size
        assert asdict(got).keys() == asdict(recipe).keys()


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no recipe 'maee'; nearest: mae"):
        variant("maee", Cost())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_prediction_on_a_gpu(name: str, precision: str) -> None:
    config = replace(SMALL[name], batch_size=64, precision=precision, input_size=(192,))
    cost, _ = count(config, "cuda")
    device = torch.device("cuda")
    model = build(config).to(device).train()
    model.autocast = torch.bfloat16 if precision == "bf16" else None
    optimizers = make_optimizers(model, config)
    normalise = Normalise([0.5] * 3, [0.5] * 3, device)
    images = torch.randint(0, 255, (64, 3, *config.size), dtype=torch.uint8)
    update(model, optimizers, [normalise(images)], 1, config.clip_grad)
    torch.cuda.reset_peak_memory_stats()
    update(model, optimizers, [normalise(images)], 1, config.clip_grad)
    assert cost.peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
