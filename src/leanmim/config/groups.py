"""The groups in which the options of a command stand, on its help page and on the site."""

from dataclasses import fields
from inspect import get_annotations
from itertools import chain

from leanmim.config.base import Config

COMMON = "common"
GROUPS = {
    COMMON: (
        "run start recipes data eval masks out recipe model init input_size budget epochs hours batch_size seeds screen screen_share features "
        "dtype baselines overwrite"
    ),
    "data": "channels values statistics stats mean std crop decode",
    "labels": "label_share labels_per_class val_share class_weights",
    "augmentation": "crop_scale crop_ratio interpolation flip randaugment erase mixup cutmix mixup_switch smoothing",
    "model": "model_kwargs depth layer pool linear_init head_init drop_path",
    "masking": "masking mask_ratio mask_unit",
    "target": "target hog_cell loss",
    "decoder": "decoder_depth decoder_width decoder_heads throw select select_start fill",
    "block-wise": "segments pipeline",
    "phase": "phase_scales phase_starts phase_batches phase_accums phase_blrs",
    "optimisation": (
        "optimizer accum effective_batch blr lr min_lr layer_decay schedule warmup_share warmup_epochs weight_decay betas clip_grad "
        "ema seed"
    ),
    "evaluation": (
        "knn_data knn_every eval_every measures eval_size finetune_epochs depths weights solver k temperature c layers attentive "
        "queries Evaluate.epochs Probe.epochs Probe.warmup_epochs Probe.blr probe_batch_size shots draws void patches "
        "Evaluate.seed Probe.seed"
    ),
    "memory": "memory offload checkpointing update_in_backward shard",
    "machine": "device workers jobs threads precision channels_last compile cuda_graph deterministic images_per_second cache",
    "logging": "log_every show_every checkpoint_minutes keep track Pretrain.recipe",
    "fault": "max_bad_share max_bad_steps data_changed data_patience process_timeout",
}  # fmt: skip
"""The fields of each group, both in the order shown. A name behind a class is for its command alone, and goes before."""

FEW = 12  # so many options need no groups


def groups(kind: type[Config]) -> dict[str, list[str]]:
    """The fields of a configuration by group; of one with few fields all are common, its own before those of its bases."""
    known = {own.name for own in fields(kind)}
    names = [name for name in dict.fromkeys(chain(*map(get_annotations, kind.__mro__))) if name in known]
    if len(names) <= FEW:
        return {COMMON: names}
    place = {name: group for group, listed in GROUPS.items() for name in listed.split()}
    keys = {own if (own := f"{kind.__name__}.{name}") in place else name: name for name in names}
    found: dict[str, list[str]] = {}
    for key in sorted(keys, key=list(place).index):
        found.setdefault(place[key], []).append(keys[key])
    return found
