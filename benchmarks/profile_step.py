"""Where the time of a training step goes, and how near it is to what the machine can do.

    python benchmarks/profile_step.py

Three measures of the same steps:
- by part: wall clock of data, sampling, target, embedding, blocks, decoder (forward and backward), optimizer;
- by kind: the profiler's own time of matrix products, attention, and all other operators;
- utilisation: the matrix products and attention of the step, each timed alone on the same shapes and precision, over the
  time of the step, in turns with it.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import record
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from leanmim import MIM, build
from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.data import IMAGENET, Normalise
from leanmim.device import resolve_precision
from leanmim.recipes import RECIPES
from leanmim.step import make_optimizers, update

PARTS = ("data", "sampling", "target", "embedding", "blocks", "decoder", "optimizer")
PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
# what the profiler calls the operators that do the work of these
WORK = {"aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution", "aten::convolution_backward",
        "aten::_slow_conv2d_forward", "aten::thnn_conv2d", "mkldnn_convolution_backward"}  # fmt: skip


class Around:
    """Any object, called through a wrapper."""

    def __init__(self, inner: Any, wrapper: Callable[[Callable], Callable]) -> None:
        self.inner, self.call = inner, wrapper(inner)

    def __call__(self, *arguments: Any) -> Any:
        """Through the wrapper."""
        return self.call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Clock:
    """Wall clock of the parts of a step on the CPU, which computes as it is told."""

    def __init__(self, model: MIM) -> None:
        self.spent: Counter[str] = Counter()
        self.part, self.since = "", time.perf_counter()
        wrap(model, "draw_mask", self.inside("sampling"))
        wrap(model, "draw_splits", self.inside("sampling"))
        model.target = Around(model.target, self.inside("target"))
        wrap(model.encoder, "embed", self.before("embedding", after="blocks", back="embedding"))
        for decoder in model.decoders:
            decoder.register_forward_pre_hook(self.into_decoder)

    def turn(self, part: str) -> str:
        """What follows is of another part; returns the one before."""
        now = time.perf_counter()
        self.spent[self.part] += now - self.since
        before, self.part, self.since = self.part, part, now
        return before

    def inside(self, part: str) -> Callable[[Callable], Callable]:
        """For a function that is a part by itself, wherever it is called."""

        def wrapper(function: Callable) -> Callable:
            def call(*arguments: Any) -> Any:
                before = self.turn(part)
                result = function(*arguments)
                self.turn(before)
                return result

            return call

        return wrapper

    def before(self, part: str, after: str, back: str) -> Callable[[Callable], Callable]:
        """For a function whose result's gradient ends what comes after it."""

        def wrapper(function: Callable) -> Callable:
            def call(*arguments: Any) -> Any:
                self.turn(part)
                result = function(*arguments)
                result.register_hook(lambda _: self.turn(back) and None)
                self.turn(after)
                return result

            return call

        return wrapper

    def into_decoder(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """The decoder begins; in the backward pass it ends when the gradient reaches the encoder's tokens."""
        self.turn("decoder")
        arguments[0].register_hook(lambda _: self.turn("blocks") and None)


def wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace a method."""
    object.__setattr__(owner, name, wrapper(getattr(owner, name)))


class Step:
    """A recipe's model on random images, ready to step."""

    def __init__(self, config: Pretrain) -> None:
        self.config = config
        torch.manual_seed(0)
        self.model = build(config).train()
        self.model.autocast = resolve_precision(config.precision, torch.device("cpu"))
        self.optimizers = make_optimizers(self.model, config)
        self.images = torch.randint(256, (int(config.batch_size), config.channels, *config.size), dtype=torch.uint8)
        self.normalise = Normalise(*IMAGENET[config.channels], torch.device("cpu"))
        self()

    def __call__(self) -> float:
        """A step; its seconds."""
        before = time.perf_counter()
        update(self.model, self.optimizers, [self.normalise(self.images)])
        return time.perf_counter() - before

    def by_part(self, rounds: int) -> dict[str, float]:
        """Shares of the wall clock, with `Clock`, which this model keeps."""
        clock = Clock(self.model)
        for optimizer in self.optimizers:
            wrap(optimizer, "step", clock.inside("optimizer"))

        def batch() -> Iterator[Tensor]:
            clock.turn("data")
            yield self.normalise(self.images)

        for _ in range(rounds):
            update(self.model, self.optimizers, batch())
            clock.turn("")
        del clock.spent[""]
        total = sum(clock.spent.values())
        return {part: clock.spent[part] / total for part in PARTS}

    def by_kind(self) -> dict[str, float]:
        """Shares of the operators' own time."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self()
        own: Counter[str] = Counter()
        for event in found.key_averages():
            kind = (
                "products"
                if event.key in WORK
                else "attention"
                if event.key.removeprefix("aten::") in ATTENTION
                else event.key
            )
            own[kind] += event.self_cpu_time_total
        total = sum(own.values())
        others = [(key, time) for key, time in own.most_common() if key not in ("products", "attention")]
        return {"products": own["products"] / total, "attention": own["attention"] / total} | {
            key: time / total for key, time in others[:8]
        }


class Products(TorchDispatchMode):
    """Remembers the matrix products and attention of a step: operator and arguments, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func._overloadpacket).rpartition(".")[2] in PRODUCTS | ATTENTION:
            key = f"{func} {[(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]}"
            if key not in self.seen:
                like = [
                    torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) if isinstance(a, Tensor) else a
                    for a in args
                ]
                self.seen[key] = [func, like, kwargs, 0]
            self.seen[key][3] += 1
        return func(*args, **kwargs)


def alone(products: Products, rounds: int) -> float:
    """Seconds of all products of a step, each timed by itself: the best of some rounds, which is what the machine can do."""
    total = 0.0
    with torch.no_grad():
        for func, args, kwargs, times in products.seen.values():
            func(*args, **kwargs)
            best = min(timed(lambda: func(*args, **kwargs)) for _ in range(rounds))  # noqa: B023
            total += times * best
    return total


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def utilisation(step: Step, rounds: int) -> dict[str, float]:
    """The products alone over the step, in turns."""
    products = Products()
    with products:
        step()
    pairs = [(alone(products, 3), step()) for _ in range(rounds)]
    flops = count(step.config)[0].train_flops_per_image * int(step.config.batch_size)
    seconds = statistics.median(whole for _, whole in pairs)
    return {
        "utilisation": statistics.median(part / whole for part, whole in pairs),
        "seconds": seconds,
        "gflops_per_second": flops / seconds / 1e9,
        "ceiling_gflops_per_second": flops / statistics.median(part for part, _ in pairs) / 1e9,
    }


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Stacked bars, one for each recipe and model."""
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.6), layout="constrained")
    names = [f"{row['recipe']}, {row['model']}, {row['px']} px" for row in rows]
    left = [0.0] * len(rows)
    for part, colour in zip(PARTS, plt.colormaps["tab10"].colors, strict=False):
        width = [100 * row["parts"][part] for row in rows]
        axes.barh(names, width, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a step, %")
    axes.legend(
        ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, columnspacing=1, handlelength=1
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


CASES = [
    ("mae", "vit_base_patch16_224", 224), ("mae", "vit_small_patch16_224", 224), ("mae", "vit_tiny_patch16_224", 128),
    ("pr-mim", "vit_small_patch16_224", 224), ("bim", "vit_small_patch16_224", 224), ("simmim", "vit_small_patch16_224", 224),
    ("fastmim", "vit_small_patch16_224", 128), ("fastmim", "swin_tiny_patch4_window7_224", 128), ("fastmim", "convnext_atto", 128),
]  # fmt: skip


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    raw: list[dict[str, Any]] = []
    for recipe, model, size in CASES:
        config = replace(
            RECIPES[recipe], data="-", out="-", model=model, input_size=(size,), batch_size=arguments.batch_size, blr=1e-4,
            epochs=100, precision=arguments.precision,
        )  # fmt: skip
        step = Step(config)
        found: dict[str, Any] = {"recipe": recipe, "model": model.partition("_patch")[0], "px": size}
        found |= utilisation(step, arguments.rounds) | {"kinds": step.by_kind()}
        found |= {"parts": step.by_part(arguments.rounds)}
        raw.append(found)
        print(found, flush=True)
    rows = [
        {key: found[key] for key in ("recipe", "model", "px")}
        | {part: f"{100 * found['parts'][part]:.1f}" for part in PARTS}
        | {
            "products": f"{100 * found['kinds']['products']:.1f}", "attention": f"{100 * found['kinds']['attention']:.1f}",
            "all else": f"{100 * (1 - found['kinds']['products'] - found['kinds']['attention']):.1f}",
            "utilisation": f"{100 * found['utilisation']:.1f}", "GFLOP/s": f"{found['gflops_per_second']:.0f}",
        }
        for found in raw
    ]  # fmt: skip
    configuration = {"batch": arguments.batch_size, "precision": arguments.precision, "threads": torch.get_num_threads(),
                     "rounds": arguments.rounds}  # fmt: skip
    note = (
        "All in percent of a step, but the last column. Parts: wall clock, forward and backward together; data is the "
        "normalisation, reading is ahead in other processes. Products, attention and all else: the operators' own time by the "
        "profiler. Utilisation: matrix products and attention of the step timed alone, on the same shapes and precision, over the "
        "step."
    )
    draw(raw, record.RESULTS / "profile-cpu.png")
    record.write("profile-cpu", "Where the time of a step goes", configuration, rows, raw, note)


if __name__ == "__main__":
    main()
