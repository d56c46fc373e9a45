"""What a training step costs, counted and not estimated: the real step runs on fake tensors.

Fake tensors have shapes but no memory, so that a ViT-H is counted in seconds on any machine, without a GPU. FLOPs are
torch's own count (matrix products and convolutions, two for a multiply-add). Bytes are those of every storage that
lives during the step, followed from its birth to its end, and sorted by what they are for. What a kernel allocates
for itself and frees before it returns is not seen.
"""

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from typing import Any, cast

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from leanmim.config import Cost, Pretrain
from leanmim.data import Normalise
from leanmim.decoder import Decoder, cached_sincos
from leanmim.device import resolve_precision
from leanmim.encoders import create_backbone
from leanmim.errors import UserError
from leanmim.masking import distances
from leanmim.mim import MIM, build
from leanmim.offload import Offload
from leanmim.recipes import RECIPES, variant
from leanmim.schedule import stages
from leanmim.step import make_optimizers, update

Flops = dict[str, int]  # part (encoder, decoder, target) -> FLOPs


@dataclass(frozen=True)
class StepCost:
    """What one training step of a recipe costs. Bytes are peaks over the step, each kind's own."""

    recipe: str
    model: str
    batch_size: int
    """Images of one forward pass."""
    forward_flops_per_image: int
    train_flops_per_image: int
    """Forward and backward."""
    encoder_parameters: int
    decoder_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    """Kept by autograd for the backward pass, weights aside."""
    transient_bytes: int
    """All that is none of the above: inputs, results on their way, copies in another precision."""
    peak_bytes: int
    """Of everything at once; not the sum of the kinds, whose peaks fall at different times."""
    encoder_tokens: int
    """Tokens that the encoder returns for an image."""
    decoder_tokens: int
    """Tokens that the decoder's layers see."""


class Storages(TorchDispatchMode):
    """Follows every storage that an operator makes: live bytes by kind, now and at their peak.

    Args:
        round_to: what the device's allocator rounds sizes up to, bytes.
    """

    def __init__(self, round_to: int = 1) -> None:
        super().__init__()
        self.round_to = round_to
        self.live: dict[int, tuple[weakref.ref, int, str]] = {}
        self.held: Counter[int] = Counter()  # storage -> how many times autograd holds it
        self.kinds: dict[int, str] = {}  # storage on the host -> its kind on the device
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def add(self, kind: str, size: int) -> None:
        """Count ``size`` bytes more; what waits on the host is not the device's."""
        for name in (kind, "all") if kind != "host" else (kind,):
            self.now[name] += size
            self.peak[name] = max(self.peak[name], self.now[name])

    def follow(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, or change its kind."""
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps a storage's Python object as long as the storage
        if key in self.live:
            reference, size, old = self.live[key]
            if kind and kind != old:
                self.drop(old, size)
                self.live[key] = reference, size, kind
                self.add(kind, size)
        else:
            size = -(-storage.nbytes() // self.round_to) * self.round_to
            self.live[key] = weakref.ref(storage, partial(self.forget, key)), size, kind or "transient"
            self.add(kind or "transient", size)

    def store(self, tensor: Tensor) -> Tensor:
        """A copy that is not on the device, for `Offload`."""
        kind = self.live[id(tensor.untyped_storage())][2]
        copy = tensor.clone()
        self.follow(copy, "host")
        self.kinds[id(copy.untyped_storage())] = kind
        return copy

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy on the device of what was stored."""
        copy = tensor.clone()
        self.follow(copy, self.kinds.pop(id(tensor.untyped_storage())))
        return copy

    def forget(self, key: int, _: Any) -> None:
        """A storage has ended."""
        _, size, kind = self.live.pop(key)
        self.drop(kind, size)

    def drop(self, kind: str, size: int) -> None:
        """Count ``size`` bytes less."""
        for name in (kind, "all") if kind != "host" else (kind,):
            self.now[name] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, follow its results."""
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
        return result


def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of fused attention: queries times keys, weights times values; shapes are b h t d."""
    (b, heads, queries, d), keys = q, k[2]
    return 2 * b * heads * queries * keys * (d + v[3])


def attention_backward_flops(
    _: Any, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *__: Any, **___: Any
) -> int:
    """Of its backward pass: the weights once more, then the gradients of values, weights, queries and keys, as torch counts
    the kernels of GPUs.
    """
    (b, heads, queries, d), keys = q, k[2]
    return 2 * b * heads * queries * keys * (3 * d + 2 * v[3])


ON_CPU = {  # torch has formulas for the attention kernels of GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
MATRIX_PRODUCTS = frozenset(
    "mm addmm bmm baddbmm matmul linear bilinear trilinear conv conv1d conv2d conv3d convolution attention depthwise2d lstm gru rnn".split()
)


class NoneUncounted(TorchDispatchMode):
    """Refuses operators that multiply matrices by their name, and have no formula: counted as zero they would be a lie.

    Args:
        counter: who counts; it is to be entered after this mode, so that this one sees what the counter has decomposed.

    Raises:
        UserError: on such an operator.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, if it is a known one."""
        packet = getattr(func, "_overloadpacket", func)
        name = str(packet).rpartition(".")[2]
        if packet not in self.counter.flop_registry and MATRIX_PRODUCTS & set(name.split("_")):
            raise UserError(
                f"torch {torch.__version__} has no FLOP count for {packet}, which multiplies matrices, so this model cannot "
                "be counted; please report it with the model's name"
            )
        return func(*args, **kwargs or {})


class Held:
    """A tensor that autograd keeps for the backward pass; its end is the end of the keeping."""

    def __init__(self, tensor: Tensor, storages: Storages) -> None:
        self.tensor, self.storages, self.key = tensor, storages, id(tensor.untyped_storage())
        if self.key in storages.live and storages.live[self.key][2] in ("transient", "saved"):
            storages.follow(tensor, "saved")
            storages.held[self.key] += 1

    def __del__(self) -> None:
        held = self.storages.held
        if self.key in held:
            held[self.key] -= 1
            if not held[self.key]:
                del held[self.key]
                self.storages.follow(self.tensor, "transient")


class AsOnCuda(TorchFunctionMode):
    """Lets fake CPU tensors do what CUDA does: its attention kernels, and layer norms in float32 under autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the two functions in which the devices differ."""
        kwargs = kwargs or {}
        if func is nn.functional.layer_norm and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:], **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            return attention_on_cuda(*args, **kwargs)
        return func(*args, **kwargs)


def attention_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """The kernel that CUDA would choose: flash in half precision without a mask, else the memory-efficient one."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    if attn_mask is None and q.dtype != torch.float32:
        pad = -q.shape[-1] % 8
        q, k, v = (nn.functional.pad(x, (0, pad)) if pad else x for x in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
        return out[..., : out.shape[-1] - pad]
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype)
        if pad := -attn_mask.shape[-1] % 16:  # its rows must be aligned
            attn_mask = nn.functional.pad(attn_mask, (0, pad))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p)[0]


def cuda_workspace() -> int:
    """Bytes that cuBLAS takes from torch's allocator: 32 MiB on Hopper, a little over 8 MiB elsewhere."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return 4096 * 8 * 1024 if hopper else 2 * 4096 * 1024 + 8 * 16 * 1024


class Stopwatch:
    """FLOPs by phase (forward, backward) and part, read off one counter as the step goes along."""

    def __init__(self, counter: FlopCounterMode, model: MIM | Offload) -> None:
        self.counter, self.model = counter, model
        self.flops: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.seen, self.phase, self.part = 0, "forward", "encoder"

    def turn(self, *, phase: str | None = None, part: str | None = None) -> None:
        """What comes from here on counts for another phase or part."""
        total = self.counter.get_total_flops()
        self.flops[self.phase, self.part] += total - self.seen
        self.seen = total
        self.phase, self.part = phase or self.phase, part or self.part

    def into_decoder(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before a decoder's forward; its backward ends when the gradient reaches the encoder's tokens."""
        self.turn(part="decoder")
        tokens = arguments[0]
        self.tokens["encoder"] = max(self.tokens["encoder"], tokens.shape[1])
        tokens.register_hook(lambda gradient: self.turn(part="encoder"))

    def into_layers(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before a decoder's layers."""
        self.tokens["decoder"] = max(self.tokens["decoder"], arguments[0].shape[1])

    def losses(self, images: Tensor) -> Iterator[Tensor]:
        """The model's losses, backward passes told from forward ones."""
        for loss in self.model(images):
            self.turn(phase="backward")
            yield loss
            self.turn(phase="forward", part="encoder")


def batches(images: Tensor, normalise: Normalise, accum: int) -> Iterator[Tensor]:
    """Batches as the loop makes them: the bytes live as long as the batch is worked on."""
    for _ in range(accum):
        read = images.clone()
        yield normalise(read)


def count(config: Pretrain, device: str = "cpu") -> tuple[StepCost, dict[str, Flops]]:
    """The cost of a recipe: with stages, the bytes and tokens of the one with the highest peak, and the FLOPs of an
    image on average over the epochs. Arguments and errors as for `count_stage`.
    """
    table = stages(config)
    counted = [count_stage(stage.config, device) for stage in table]
    shares = [(stage.stop - stage.start) / config.epochs for stage in table]
    flops = {
        phase: {part: round(sum(share * f[phase][part] for share, (_, f) in zip(shares, counted, strict=True)))
                for part in parts}
        for phase, parts in counted[0][1].items()
    }  # fmt: skip
    most = max((entry for entry, _ in counted), key=lambda entry: entry.peak_bytes)
    return replace(
        most,
        forward_flops_per_image=sum(flops["forward"].values()),
        train_flops_per_image=sum(flops["training"].values()),
    ), flops


def count_stage(config: Pretrain, device: str = "cpu") -> tuple[StepCost, dict[str, Flops]]:
    """Count one training step as `update` does it, accumulation included.

    Args:
        config: the recipe; its batch size (a number), accumulation and precision count too.
        device: ``cpu`` or ``cuda``; the machine need not have it.

    Returns:
        The cost, and FLOPs per image of the forward pass and of training, by part.

    Raises:
        UserError: the recipe cannot be built.
    """
    cuda, batch = device == "cuda", int(config.batch_size)
    if cuda and config.precision == "auto" and not torch.cuda.is_available():
        config = replace(config, precision="bf16")
    backbone = create_backbone(
        config.model, config.size, config.channels, config.depth, device="meta", **config.model_kwargs
    )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for cached in (cached_sincos, distances):
        cached.cache_clear()  # no table may cross the border between real and fake
    try:
        with fake, torch.random.fork_rng(devices=[]):
            model = build(config, backbone.to_empty(device="cpu")).train()
            model.autocast = resolve_precision(config.precision, torch.device(device))
            optimizers = make_optimizers(model, config)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            for optimizer in optimizers:  # so that its state is there from the start, as in any step but the first
                optimizer.step()
                optimizer.zero_grad()
            normalise = Normalise([0.5] * config.channels, [0.5] * config.channels, torch.device("cpu"))
            images = torch.empty(batch, config.channels, *config.size, dtype=torch.uint8)

            storages = Storages(round_to=512 if cuda else 1)
            for tensor in (*model.parameters(), *model.buffers()):
                storages.follow(tensor, "weights")
            for optimizer in optimizers:
                for tensor in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
                    storages.follow(tensor, "optimizer")
            trained: MIM | Offload = model
            if config.offload and cuda:
                with storages:
                    trained = Offload(model, optimizers, images.device, storages.fetch, storages.store)
                storages.peak = storages.now.copy()
            with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
                model.target(normalise(images))
            target = counter.get_total_flops() // batch
            counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
            watch = Stopwatch(counter, trained)
            with ExitStack() as stack:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        hook = parameter.register_post_accumulate_grad_hook(
                            lambda p: storages.follow(p.grad, "gradients")
                        )
                        stack.callback(hook.remove)
                for decoder in cast(list[Decoder], model.decoders):
                    decoder.register_forward_pre_hook(watch.into_decoder)
                    decoder.layers.register_forward_pre_hook(watch.into_layers)
                stack.enter_context(saved_tensors_hooks(lambda t: Held(t, storages), lambda held: held.tensor))
                if cuda:
                    stack.enter_context(AsOnCuda())
                stack.enter_context(storages)
                stack.enter_context(NoneUncounted(counter))
                stack.enter_context(counter)
                accum = min(config.accum, 2)  # a third batch finds what the second found
                update(watch.losses, optimizers, batches(images, normalise, accum), accum, config.clip_grad)
    finally:
        for cached in (cached_sincos, distances):
            cached.cache_clear()
    watch.turn()

    flops = {
        name: {
            part: sum(watch.flops[phase, part] for phase in phases) // (batch * accum)
            for part in ("encoder", "decoder")
        }
        for name, phases in (("forward", ("forward",)), ("training", ("forward", "backward")))
    }
    for parts in flops.values():
        parts["encoder"] -= target
        parts["target"] = target
    peak = storages.peak
    parameters = sum(p.numel() for p in model.parameters())
    of_decoders = sum(p.numel() for p in model.decoders.parameters())
    return (
        StepCost(
            recipe=config.recipe,
            model=config.model,
            batch_size=batch,
            forward_flops_per_image=sum(flops["forward"].values()),
            train_flops_per_image=sum(flops["training"].values()),
            encoder_parameters=parameters - of_decoders,
            decoder_parameters=of_decoders,
            weight_bytes=peak["weights"],
            gradient_bytes=peak["gradients"],
            optimizer_bytes=peak["optimizer"],
            saved_bytes=peak["saved"],
            transient_bytes=peak["transient"],
            peak_bytes=peak["all"] + (cuda_workspace() if cuda else 0),
            encoder_tokens=watch.tokens["encoder"],
            decoder_tokens=watch.tokens["decoder"],
        ),
        flops,
    )


def readable(size: int | float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def table(costs: list[StepCost], flops: list[dict[str, Flops]]) -> str:
    """One column for each recipe; from the second on with the ratio to the first."""
    rows: list[tuple[str, list[float], Callable[[float], str]]] = []

    def row(name: str, values: Iterable[float], form: Callable[[float], str]) -> None:
        rows.append((name, list(values), form))

    for phase, title in (("forward", "forward, GFLOP an image"), ("training", "training, GFLOP an image")):
        row(title, (sum(f[phase].values()) / 1e9 for f in flops), "{:.2f}".format)
        for part in ("encoder", "decoder", "target"):
            row(f"  {part}", (f[phase][part] / 1e9 for f in flops), "{:.2f}".format)
    for part in ("encoder", "decoder"):
        row(f"{part} parameters, M", (getattr(c, f"{part}_parameters") / 1e6 for c in costs), "{:.2f}".format)
    for kind, title in (
        ("weight", "weights"), ("gradient", "gradients"), ("optimizer", "optimizer state"),
        ("saved", "saved for backward, peak"), ("transient", "transient, peak"), ("peak", "all together, peak"),
    ):  # fmt: skip
        row(title, (getattr(c, f"{kind}_bytes") for c in costs), readable)
    for part in ("encoder", "decoder"):
        row(f"{part} tokens an image", (getattr(c, f"{part}_tokens") for c in costs), "{:.0f}".format)

    first = costs[0]
    form = Table(box=SIMPLE)
    form.add_column("")
    for cost in costs:
        form.add_column(cost.recipe, justify="right")
    for name, values, write in rows:
        ratios = [f" ({value / values[0]:4.2f})" if values[0] else "" for value in values]
        form.add_row(name, *(write(value) + ratios[i] * (i > 0) for i, value in enumerate(values)))
    text = StringIO()
    Console(file=text, width=40 + 24 * len(costs), highlight=False).print(form)
    lines = [f"One training step, {first.model}, batch {first.batch_size}", text.getvalue().strip("\n")]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())


def cost(config: Cost) -> str:
    """The cost of recipes, as a table against the first one, or as JSON.

    Raises:
        UserError: a recipe is unknown, or does not go with the model or the input size.
    """
    config.check()
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    configs = [variant(name, config) for name in config.recipes or tuple(RECIPES)]
    if len(configs) > 1:  # beside recipes with segments there may be others, which have none to keep elsewhere
        configs = [replace(c, offload=False) if c.segments in (1, (1,)) else c for c in configs]
    counted = [count(config, device) for config in configs]
    costs = [entry for entry, _ in counted]
    if config.json:
        return json.dumps([asdict(entry) for entry in costs], indent=2)
    text = table(costs, [flops for _, flops in counted])
    return text + f"\nnothing to offload: {device} has no memory of its own" * (config.offload and device == "cpu")
