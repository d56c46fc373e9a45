"""Recipes are values: a published method with its published numbers, or a change of one.

`data` and `out` are the user's; fill them in with ``dataclasses.replace(MAE, data="photos", out="run")``.

Costs are of ViT-B/16 and one image; kNN and linear probe are those of a small ViT after 8 epochs on 10,000 images of CIFAR-10, mean
and spread of three seeds (benchmarks/README.md). Untrained it has 29.8 ± 1.0 and 42.1 ± 1.3 %.
"""

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, replace
from io import StringIO
from typing import Any

import tyro

from leanmim.config import Config, Cost, Logging, Plan, Pretrain
from leanmim.errors import UserError

MAE = Pretrain(data="", out="", recipe="mae")
"""Masked autoencoder (arXiv 2111.06377): 75 % of the patches dropped, 8 x 512 decoder (smaller below
ViT-B), normalised pixels.

    leanmim pretrain mae --data photos --model vit_small_patch16_224 --out run

As published; crops are torchvision's RandomResizedCrop, as MAE's are, and the decoder's last layer predicts the masked
patches only, on which alone the loss depends.

58.4 training GFLOP, 80 MiB saved for backward; kNN 40.7 ± 1.1 %, linear probe 49.4 ± 0.7 %.
"""

SIMMIM = replace(
    MAE,
    recipe="simmim",
    input_size=(192,),
    masking="token",
    mask_ratio=0.6,
    mask_unit=32,
    target="raw-pixels",
    loss="l1",
    decoder_depth=0,
    schedule="step",
    warmup_share=10 / 800,
    betas=(0.9, 0.999),
    clip_grad=5.0,
    crop_scale=(0.67, 1.0),
    interpolation="bilinear",
)
"""SimMIM (arXiv 2111.09886): a learned token in squares of 32 px, one linear layer, raw pixels, ViT and Swin.

    leanmim pretrain simmim --data photos --model swin_tiny_patch4_window7_224 --out run

As published for 800 epochs of Swin; its runs of 100 epochs have twice the base learning rate and a cosine schedule. The
published ViT is not timm's: it has one shared relative-position bias and no absolute positions, layer scale 0.1, drop path
0.1, and was trained at 224 px. So its 83.8 % does not hold for a ViT here.

77.3 training GFLOP; kNN 28.6 ± 0.9 %, linear probe 41.0 ± 0.7 % (batch 128, with a cosine and bicubic
crops, before the schedule was as published): too few epochs for it.
"""

FASTMIM = replace(
    MAE,
    recipe="fastmim",
    input_size=(128,),
    linear_init="xavier",
    masking="pixel",
    target="hog",
    warmup_share=20 / 800,
)
"""FastMIM (arXiv 2212.06593): low resolution, a colour painted on masked squares of one patch, HOG, any backbone.

    leanmim pretrain fastmim --data photos --model pvt_v2_b2 --out run

Differs from the published code: LayerNorm's eps in the decoder is 1e-6 here and 1e-5 there; HOG is exact here, while
angles in half precision put some pixels into the wrong bin there.

0.44 of SimMIM's training FLOPs, 0.49 of its bytes saved; kNN 33.5 %, linear probe 44.4 % (one seed, before warm-up and
colour were as published).
"""

FASTMIM_P = replace(FASTMIM, recipe="fastmim-p", phase_scales=(1.0, 1.25, 1.5), phase_starts=(0.0, 0.5, 0.8))
"""FastMIM-P: the resolution grows during training, 128, 160 and 192 px from 0, 50 and 80 % of the epochs on (the
paper names no phases; these are ours).

    leanmim pretrain fastmim-p --data photos --model swin_tiny_patch4_window7_224 --out run

Differs from the published code as FASTMIM.

0.63 of SimMIM's training FLOPs; its accuracy is not yet measured, that of a growing MAE with HOG is.
"""

PR_MIM = replace(MAE, recipe="pr-mim", throw=0.5)
"""PR-MIM (arXiv 2411.15746): MAE whose decoder sees the visible and a furthest-sampled third of the masked patches;
half of all patches are thrown, and filled in from the others by one thin attention layer (ours).

    leanmim pretrain pr-mim --data photos --model vit_base_patch16_224 --out run

0.72 of MAE's training FLOPs, 0.69 of its bytes saved; kNN 39.4 ± 0.1 %, linear probe 49.3 ± 0.9 %.
"""

BIM = replace(MAE, recipe="bim", segments=4, mask_ratio=(0.72, 0.78))
"""BIM (arXiv 2311.17218): MAE in four segments, each with its own decoder of one layer and loss; no gradient crosses a
border, and later segments see fewer patches (the paper names no ratios; these are ours).

    leanmim pretrain bim --data photos --model vit_base_patch16_224 --out run

0.75 of MAE's training FLOPs, 0.20 of its bytes saved, 0.23 of its gradients, 0.36 of its peak memory with batch 64.
Where memory is all, mae --checkpointing takes less (0.27 of MAE's peak against 0.31, batch 256, bf16), for 1.22 of its FLOPs; with
--decoder-depth 1 it takes 0.23, for 0.63 of them (benchmarks/results/memory-rivals-cost.md).
A ViT of twelve thin blocks on 5,000 images: kNN 35.1 ± 0.2 %, linear probe 44.8 ± 0.3 %, MAE 32.3 ± 1.3 and 43.6 ± 0.4 %.
"""

LEAN = replace(MAE, recipe="lean", input_size=(96,), decoder_depth=1)
"""What so far is worth its cost (ours): MAE at 96 px with a decoder of one layer.

    leanmim pretrain lean --data photos --model vit_small_patch16_224 --out run

Fewer pixels leave time for more epochs. A ViT-Ti after 41 TFLOP on 9,469 photos, a quarter of an hour of one core, with --decoder-width 128
(auto takes 192), three seeds, evaluated at 128 px: fine-tuned with a tenth of the labels 49.9 ± 1.0 %, attentive probe 57.2 ± 0.5 %, linear
probe 53.6 ± 0.6 % (benchmarks/results/photos-quarter-vit_tiny_patch16_224-cpu.md); pre-trained at 128 px 47.7 ± 1.6, 55.6 ± 2.1, 52.0 ± 0.8 %,
not at all 30.5 ± 0.7, 50.1 ± 0.4, 43.8 ± 1.1 %.

After twice the FLOPs, one seed, 54.8, 58.7, 53.8 %; pre-trained at 128 px 51.6, 54.5, 51.7, at 224 px 44.5, 57.4, 50.3, for 3.5 epochs in place
of 22 (benchmarks/results/photos-budget-30-vit_tiny_patch16_224-cpu.md). After four times 56.6, 59.7, 55.5; at 128 px 53.6, 59.8, 54.7,
at 224 px 47.0, 54.8, 49.5 (benchmarks/results/photos-budget-60-vit_tiny_patch16_224-cpu.md).

With mask-ratio=0.9, which leaves 3 of its 36 patches, it has 49.0 ± 0.7, 58.4 ± 0.6, 54.4 ± 0.4 % after 41 TFLOP, pre-trained at 128 px
48.0 ± 1.3, 59.0 ± 1.4, 55.5 ± 0.3: the best by the probes, where LEAN as it is is the best after fine-tuning
(benchmarks/results/photos-ratio-vit_tiny_patch16_224-cpu.md). After twice the FLOPs 51.3, 59.2, 56.2, at 128 px 53.5, 60.0, 56.1 (one
seed, benchmarks/results/photos-ratio-30-vit_tiny_patch16_224-cpu.md).

After 41 TFLOP with twice the learning rate that auto gives 45.9 ± 0.6, 58.9 ± 0.9, 54.5 ± 1.0 %
(benchmarks/results/photos-half-vit_tiny_patch16_224-cpu.md), with half of it 48.8, 57.2, 50.5 (one seed,
benchmarks/results/photos-eighth-vit_tiny_patch16_224-cpu.md).

All else here has four times the learning rate that auto now gives a ViT-Ti. With that LEAN has 46.5 ± 0.7, 55.1 ± 0.8, 51.7 ± 1.5 %;
throwing half of the patches makes no difference, 45.8 ± 1.1, 55.2 ± 1.9, 52.3 ± 1.7 %
(benchmarks/results/photos-confirmed-vit_tiny_patch16_224-cpu.md). Fine-tuned at 224 px it has 50.4 %, one that was pre-trained at 128 px 45.9
(one seed, benchmarks/results/finetune-at-224-cpu.md). Of more than 45 epochs nothing is measured; FastMIM took 128 px for its 800.

A decoder of 192 is no worse than one of 128: with the learning rate of auto LEAN has 48.1, 59.7, 54.2 % (one seed,
benchmarks/results/photos-shipped-vit_tiny_patch16_224-cpu.md), at 128 px with four times that 43.4 ± 0.3, 55.5 ± 0.5, 51.9 ± 1.2 % for 43.8 ± 1.8,
54.9 ± 0.6, 51.9 ± 0.7 (benchmarks/results/photos-decoder-vit_tiny_patch16_224-cpu.md).

What was tried at 128 px and did not stay, one seed, in order of fine-tuning, attentive and linear probe, beside 44.5, 57.0, 53.4 %:
HOG in place of pixels 39.2, 51.3, 47.8 %; growth to 192 px 42.8, 57.6, 52.7 %; 70 % thrown 43.2, 54.9, 50.6 %; two and four segments, which are for memory, 40.8, 56.5, 53.0
and 38.6, 55.1, 51.9 %; half thrown 43.8, 56.0, 51.4, with half the learning rate 46.7, 57.6, 52.8 %
(benchmarks/results/photos-one-vit_tiny_patch16_224-cpu.md). 90 % dropped, a decoder of 192, an eighth less of the FLOPs: 41.2, 54.4, 50.0 %,
beside 42.2, 55.7, 52.6 (benchmarks/results/photos-rival-vit_tiny_patch16_224-cpu.md).

5.93 training GFLOP, 0.10 of MAE's and of its bytes saved (benchmarks/results/lean-cost.md).
"""

LEAN_MEMORY = replace(LEAN, recipe="lean-memory", throw=0.5, segments=4, offload=True)
"""LEAN in four segments as BIM has them, of which on a GPU one at a time is in its memory, and with half of the patches thrown as in PR-MIM
(ours): all three methods together.

    leanmim pretrain lean-memory --data photos --model vit_base_patch16_224 --out run

Measured as LEAN, for the same FLOPs: fine-tuned 48.0 ± 0.6 % (LEAN 49.9 ± 1.0), attentive probe 55.4 ± 1.7 % (57.2 ± 0.5), linear
probe 52.9 ± 0.4 % (53.6 ± 0.6) (benchmarks/results/photos-quarter-memory-vit_tiny_patch16_224-cpu.md). On a CPU, where no segment is
kept elsewhere, LEAN with mask-ratio=0.9 takes as little memory, predicted 119 MiB for 118, and is better: 49.0 ± 0.7, 58.4 ± 0.6, 54.4 ± 0.4 %
(benchmarks/results/photos-ratio-vit_tiny_patch16_224-cpu.md).
With four times the learning rate, by which it was chosen, 46.6 ± 1.2 % (46.5 ± 0.7), 57.0 ± 0.1 % (55.1 ± 0.8), 53.9 ± 0.5 % (51.7 ± 1.5)
(benchmarks/results/photos-confirmed-vit_tiny_patch16_224-cpu.md). With that, and without throwing, it has 41.9, 56.6, 53.3 % (one seed,
benchmarks/results/photos-together-vit_tiny_patch16_224-cpu.md): four decoders cost more than one, and throwing halves what they see.
Its first 3, 6 and 9 blocks have 45.0, 44.2, 46.3 % after fine-tuning, those trained alone 42.5, 45.4, 45.5 % (one seed,
benchmarks/results/photos-depths-vit_tiny_patch16_224-cpu.md).

6.98 training GFLOP, 0.12 of MAE's, 0.04 of its bytes saved, 0.08 of its peak memory with batch 256 on a GPU (predicted: 1.14 and
13.48 GiB, bf16) (benchmarks/results/lean-cost.md).
"""


def published(recipe: Pretrain) -> Pretrain:
    """A recipe with the numbers of its paper in place of ``auto``, given or in effect for ViT-B.

    800 epochs, base learning rate 1.5e-4 (SimMIM 1e-4 for 512 images), MAE's decoder of 8 x 512, BIM's of 1 x 512 (ours),
    FastMIM's of width 256, one layer for a ViT and four for others. Batches of 2,048 to 4,096 are 256 here.
    """
    painted = recipe.masking == "pixel"
    return replace(
        recipe,
        epochs=800,
        batch_size=256,
        blr=5e-5 if recipe.decoder_depth == 0 else 1.5e-4,
        decoder_depth=recipe.decoder_depth if painted or recipe.decoder_depth != "auto" else 1 if recipe.cut else 8,
        decoder_width=256 if painted else 512,
        decoder_heads=8 if painted else 16,
    )


RECIPES = {recipe.recipe: recipe for recipe in (MAE, SIMMIM, FASTMIM, FASTMIM_P, PR_MIM, BIM, LEAN, LEAN_MEMORY)}

SHARED = frozenset(field.name for kind in (Cost, Plan) for field in fields(kind))
"""Options of the commands that look at several recipes at once: machine, model, batch."""
WITHOUT_COST = frozenset({"data", "out", "recipe", *(field.name for field in fields(Logging))})
"""Options that say where a run is read and written."""


def variant(spec: str, changes: Config, without: Collection[str] = ()) -> Pretrain:
    """A recipe with changes: those of a command, then those of its own.

    Args:
        spec: the recipe's name, then perhaps options as `leanmim pretrain` has them: ``pr-mim:throw=0.7``, or
            ``bim:segments=3 6 12,offload=True``. Commas separate options, blanks the numbers of one option.
        changes: configuration of a command; its fields that are given (not None, not auto, not empty) hold for the recipe too.
        without: fields that the spec may not change, because the command decides them.

    Raises:
        UserError: there is no such recipe or option, or it has not such a value.
    """
    name, _, options = spec.partition(":")
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; {nearest(name, RECIPES)}")
    own = {field.name for field in fields(Pretrain)}
    given = {field.name: getattr(changes, field.name) for field in fields(changes) if field.name in own}
    config = replace(
        RECIPES[name], **{key: value for key, value in given.items() if value not in (None, "auto", (), {})}
    )
    try:
        for option in options.split(",") if options else ():
            config = changed(config, option, without)
        config.check()
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    return config


def changed(config: Pretrain, option: str, without: Collection[str]) -> Pretrain:
    """The configuration with one ``option=value`` changed, read by the parser of `leanmim pretrain`. Errors as for
    `variant`.
    """
    key, equals, value = option.partition("=")
    name = key.strip().replace("-", "_")
    possible = [field.name for field in fields(Pretrain)]
    if name not in possible:
        raise UserError(f"there is no option {key.strip()!r}; {nearest(name, possible)}")
    if name in without:
        raise UserError(f"the command itself sets {hyphens(name)} for all recipes; leave it out")
    wrong = UserError(
        f"{option!r} cannot be read; it is option=value, and `leanmim pretrain {config.recipe} --help` says what "
        f"--{hyphens(name)} takes"
    )
    if not equals or "--" in value:
        raise wrong
    try:
        with redirect_stderr(StringIO()):  # tyro's own message is about a command
            found = tyro.cli(
                Pretrain,
                args=[f"--{hyphens(name)}", *value.split()],
                default=replace(config, model_kwargs={}),  # tyro would make an option of each of them
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),  # booleans take True or False
            )
    except SystemExit:
        raise wrong from None
    return replace(config, **{name: getattr(found, name)})


def nearest(name: str, possible: Collection[str]) -> str:
    """What somebody may have meant, or all that is possible."""
    near = difflib.get_close_matches(name, possible, n=3)
    return (
        f"did you mean {' or '.join(map(hyphens, near))}?"
        if near
        else f"there are: {', '.join(map(hyphens, possible))}"
    )


def hyphens(name: str) -> str:
    """The name of a field on the command line."""
    return name.replace("_", "-")


def words(value: Any) -> list[str]:
    """A field's value as the words that follow its option on the command line."""
    if isinstance(value, dict):
        return [str(part) for pair in value.items() for part in pair]
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


def options(values: dict[str, Any]) -> Iterator[str]:
    """Fields and their values as options of a command line."""
    for name, value in values.items():
        if isinstance(value, bool):
            yield f"--{hyphens(name)}" if value else f"--no-{hyphens(name)}"
        elif value != {}:
            yield from (f"--{hyphens(name)}", *words(value))


def differences(config: Pretrain) -> dict[str, Any]:
    """Fields and their values that are not the recipe's own."""
    own = RECIPES.get(config.recipe, MAE)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if value != getattr(own, name)}


def titles(configs: Sequence[Pretrain]) -> list[str]:
    """What to call each of several configurations: the recipe, then what differs in it, as "pr-mim throw=0.7".

    A method's option is named where it is not the recipe's own. A shared one (machine, model, batch) is named, in all
    titles, where it is neither the same for all nor for each the recipe's own.
    """
    changes = [differences(config) for config in configs]
    changed_somewhere = {name for change in changes for name in change} - WITHOUT_COST
    same = {
        name
        for name in SHARED & changed_somewhere
        if all(getattr(c, name) == getattr(configs[0], name) for c in configs)
    }
    found = []
    for config, change in zip(configs, changes, strict=True):
        named = [
            f"{hyphens(field.name)}={' '.join(words(getattr(config, field.name)))}"
            for field in fields(config)
            if field.name in changed_somewhere - same and (field.name in change or field.name in SHARED)
        ]
        found.append(" ".join([config.recipe, ", ".join(named)]) if named else config.recipe)
    return found
