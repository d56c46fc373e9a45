"""FLOPs: formulas that torch lacks, operators that must have one, and how they divide among the parts of the model."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from leanmim.decoder import Decoder
from leanmim.errors import UserError

Flops = dict[str, int]  # part (encoder, decoder, target) -> FLOPs
Shape = tuple[int, ...]  # b batch, h heads, t tokens, d width of a head


def attention_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of fused attention: queries times keys, weights times values.

    Args:
        q: queries, b h t d.
        k: keys, b h t d.
        v: values, b h t d.
    """
    (b, heads, queries, d), keys = q, k[2]
    return 2 * b * heads * queries * keys * (d + v[3])


def attention_backward_flops(_: Any, q: Shape, k: Shape, v: Shape, *__: Any, **___: Any) -> int:
    """FLOPs of its backward pass: the weights once more, then the gradients of values, weights, queries and keys, as
    torch counts the kernels of GPUs.
    """
    (b, heads, queries, d), keys = q, k[2]
    return 2 * b * heads * queries * keys * (3 * d + 2 * v[3])


def convolution_backward_flops(gradient: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """FLOPs of a convolution's backward pass: those of the forward pass for each of the two gradients that is asked for.

    torch counts a convolution in groups, as a depthwise one is, as if its weights' gradient joined all channels.

    Args:
        gradient: of the output, b c H W.
        x: the input, b c H W.
        weight: its second axis is that of one group.
        rest: bias sizes, stride, padding, dilation, transposed, output padding, groups, and which gradients are asked for.
    """
    transposed, asked = rest[4], rest[7]
    positions = math.prod((x if transposed else gradient)[2:])
    return 2 * gradient[0] * positions * math.prod(weight) * (bool(asked[0]) + bool(asked[1]))


FORMULAS = {  # torch 2.14 has formulas for the attention kernels of GPUs only
    torch.ops.aten.convolution_backward: convolution_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
MATRIX_PRODUCTS = frozenset([
    "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "bilinear", "trilinear", "conv", "conv1d", "conv2d", "conv3d",
    "convolution", "depthwise2d", "attention", "lstm", "gru", "rnn",
])  # fmt: skip
"""Words in an operator's name each of which says that it multiplies matrices."""


class Anywhere(ModuleTracker):
    """In place of the counter's own tracker: totals are all that is read here, and its hooks on gradients would keep alive what
    activation checkpointing computes again.
    """

    def __enter__(self) -> "Anywhere":
        """Watch no module."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was watched."""


def flop_counter() -> FlopCounterMode:
    """torch's counter with our formulas, so that all versions of torch count the same."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = Anywhere()
    return counter


class NoneUncounted(TorchDispatchMode):
    """Refuses an operator that multiplies matrices, by its name, and has no formula: it would count as zero.

    Args:
        counter: the counter that is in use; enter it after this mode, which then sees what the counter has decomposed.

    Raises:
        UserError: on such an operator.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator if its FLOPs are known."""
        packet = getattr(func, "_overloadpacket", func)
        name = str(packet).rpartition(".")[2]
        if MATRIX_PRODUCTS & set(name.split("_")) and packet not in self.counter.flop_registry:
            raise UserError(
                f"torch {torch.__version__} has no FLOP count for {packet}, which multiplies matrices, so this model "
                "cannot be counted; please report it with the model's name"
            )
        return func(*args, **kwargs or {})


class Stopwatch:
    """FLOPs of a step by pass (forward, backward) and part (encoder, decoder), read off one counter during the step.

    Args:
        counter: the counter that is in use.
        model: images in, losses out, as `MIM`.
        decoders: of the model; the hooks on them stay.
    """

    def __init__(
        self, counter: FlopCounterMode, model: Callable[[Tensor], Iterable[Tensor]], decoders: Iterable[Decoder]
    ) -> None:
        self.counter, self.model = counter, model
        self.flops: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.segments: Counter[int] = Counter()  # FLOPs by segment
        self.read_bytes = 0  # of what a decoder reads of a batch, at most
        self.seen, self.direction, self.part, self.segment = 0, "forward", "encoder", 0
        for decoder in decoders:
            decoder.register_forward_pre_hook(self.into_decoder)
            decoder.layers.register_forward_pre_hook(self.into_layers)

    def turn(self, *, direction: str | None = None, part: str | None = None, segment: int | None = None) -> None:
        """Count what was done since the last turn; what follows is of another pass, part or segment."""
        total = self.counter.get_total_flops()
        self.flops[self.direction, self.part] += total - self.seen
        self.segments[self.segment] += total - self.seen
        self.seen, self.segment = total, self.segment if segment is None else segment
        self.direction, self.part = direction or self.direction, part or self.part

    def into_decoder(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before a decoder's forward pass; its backward pass ends when the gradient reaches the encoder's tokens."""
        self.turn(part="decoder")
        tokens = arguments[0]
        self.tokens["encoder"] = max(self.tokens["encoder"], tokens.shape[1])
        self.read_bytes = max(self.read_bytes, tokens.nbytes)
        tokens.register_hook(lambda gradient: self.turn(part="encoder"))

    def into_layers(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before a decoder's layers."""
        self.tokens["decoder"] = max(self.tokens["decoder"], arguments[0].shape[1])

    def losses(self, images: Tensor) -> Iterator[Tensor]:
        """The model's losses; the caller goes backward from each before it asks for the next."""
        losses = iter(self.model(images))
        del images
        for i in count():
            # the pass before may have been another batch's
            self.turn(direction="forward", part="encoder", segment=i)
            loss = next(losses, None)
            if loss is None:
                return
            self.turn(direction="backward")
            yield loss
            del loss

    def per_image(self, images: int, target: int) -> dict[str, Flops]:
        """FLOPs of an image, of the forward pass alone and of training (forward and backward).

        Args:
            images: of the step, over all batches.
            target: FLOPs of the target of an image, which were counted as the encoder's.
        """
        self.turn()
        passes = {"forward": ("forward",), "training": ("forward", "backward")}
        flops = {
            name: {
                part: sum(self.flops[direction, part] for direction in directions) // images
                for part in ("encoder", "decoder")
            }
            for name, directions in passes.items()
        }
        return {
            name: {**parts, "encoder": parts["encoder"] - target, "target": target} for name, parts in flops.items()
        }
