"""What a fine-tuning says before its first step."""

from collections.abc import Iterator

from leanmim.auto import few_steps
from leanmim.classifier.groups import blocks_of
from leanmim.classifier.model import Made, heads
from leanmim.classifier.tuning import Tuning
from leanmim.config import Finetune
from leanmim.costs import StepCost
from leanmim.data.labels import Labels
from leanmim.files import readable
from leanmim.names import sides
from leanmim.start import Start

SHOWN = ("drop_path", "mixup", "cutmix", "smoothing", "randaugment", "erase", "ema", "clip_grad", "weight_decay")


def header(
    config: Finetune, start: Start, labels: Labels, made: Made, tuning: Tuning, predicted: StepCost, steps: int
) -> Iterator[str]:
    """Start, model, data, recipe, schedule, predicted cost, and warnings."""
    height, width = made.architecture.size
    precision = "bf16" if tuning.losses.autocast else "fp32"
    yield f"fine-tuning {start.origin}"
    if start.weights is not None:
        outside = tuple(f"{name}." for name in (*heads(made.model), "norm", "fc_norm"))
        untrained = [name for name in made.fresh if not name.startswith(outside)]
        yield f"fresh: {', '.join(dict.fromkeys(name.partition('.')[0] for name in made.fresh)) or 'nothing'}" + (
            f"; {len(untrained)} weights of layers that pre-training left out" if untrained else ""
        )
    yield (
        f"{made.architecture.model}, {predicted.encoder_parameters / 1e6:.1f} M parameters, {height} x {width} px, "
        f"{precision} on {tuning.device}; {len(blocks_of(made.model))} layers, layer decay {config.layer_decay:g}"
    )
    usual = made.model.pretrained_cfg.get("input_size", (3, 0, 0))[1:]
    if start.pretrained and height * width < usual[0] * usual[1] and "patch_size" not in made.architecture.model_kwargs:
        yield (
            f"of photos larger than {sides((height, width))} px, --input-size {sides(usual)} shows more and may be more accurate, "
            f"for some {usual[0] * usual[1] / (height * width):.1f} times the cost"
        )
    yield (
        f"{len(labels.train)} images of {len(labels.classes)} classes in {labels.root}, {len(labels.val)} to validate with; "
        f"{steps} steps in {config.epochs:g} epochs, warm-up {config.warmup:g}"
    )
    yield from labels.notes
    numbers = ", ".join(f"{name.replace('_', '-')} {getattr(config, name)}" for name in SHOWN)
    yield f"recipe {config.recipe}: {numbers}"
    lr = float(config.blr) * tuning.images / 256
    yield (
        f"effective batch {tuning.images} = {config.batch_size} x accum {config.accum} x {tuning.process.world} processes; "
        f"lr {lr:.3g} = blr {float(config.blr):.3g} x {tuning.images} / 256"
    )
    if tuning.losses.weights is not None:
        yield f"classes are weighed from {tuning.losses.weights.min():.2g} to {tuning.losses.weights.max():.2g}"
    yield (
        f"predicted: {readable(predicted.peak_bytes)} at the peak, "
        f"{predicted.train_flops_per_image / 1e9:.3g} GFLOP an image"
    )
    if config.recipe != "small":
        yield from few_steps(steps)
