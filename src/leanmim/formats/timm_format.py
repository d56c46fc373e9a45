"""timm: ``model.safetensors`` with the backbone's own keys, and timm's ``config.json``."""

from pathlib import Path
from typing import Any

import torch

from leanmim.config import Pretrain
from leanmim.encoders.backbone import Backbone, Truncated, backbone_arguments, backbone_of, shallower
from leanmim.mim import MIM
from leanmim.weights import truncated


def timm_files(config: Pretrain, model: MIM, state: dict[str, Any], depth: int | None = None) -> dict[str, Any]:
    """The backbone's weights and timm's description of it; timm.create_model loads them strictly.

    A backbone that timm cannot build so shallow, or that was pre-trained without its last layers (--depth), is written
    whole: what pre-training left out is initialised afresh, and ``not_pretrained`` in the description names it.

    Args:
        config: of the run.
        model: of the run.
        state: its checkpoint.
        depth: only so many blocks or stages, the end of a segment; None is all.

    Raises:
        UserError: no segment ends at ``depth``.
    """
    encoder = truncated(model.encoder, config, depth)
    if isinstance(encoder, Truncated):
        backbone, trained_depth = encoder.backbone, depth or config.depth
    elif encoder is model.encoder.backbone:
        backbone, trained_depth = encoder, config.depth
    else:  # a shallower model of timm's
        backbone, trained_depth = encoder, None
    arguments, weights = timm_arguments(config, model, depth), backbone.state_dict()
    if trained_depth is None:
        return {"model.safetensors": weights, "config.json": describe(backbone, arguments, config, state)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        whole = backbone_of(config)
    description = describe(whole, arguments, config, state)
    fresh = sorted(whole.state_dict().keys() - weights.keys())
    description["leanmim"] |= {"depth": trained_depth, "not_pretrained": fresh}
    return {"model.safetensors": whole.state_dict() | weights, "config.json": description}


def describe(backbone: Backbone, arguments: dict[str, Any], config: Pretrain, state: dict[str, Any]) -> dict[str, Any]:
    """timm's description of a backbone, which timm.create_model makes with these arguments."""
    description = {
        "architecture": config.model.partition(".")[0],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.channels, *config.size],
            "fixed_input_size": "img_size" in backbone_arguments(config),  # timm gives it to those models only
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": state["mean"],
            "std": state["std"],
            "num_classes": 0,
            "first_conv": backbone.pretrained_cfg["first_conv"],
            "classifier": backbone.pretrained_cfg["classifier"],
        },
        "leanmim": {"recipe": config.recipe, "step": state["step"], "epochs": config.epochs},
    }
    if isinstance(pool := getattr(backbone, "global_pool", None), str):  # elsewhere it is a module, or the head's
        description["global_pool"] = pool
    return description


def timm_arguments(config: Pretrain, model: MIM, depth: int | None = None) -> dict[str, Any]:
    """What timm.create_model needs beside the name to build the run's backbone, or its first ``depth`` blocks or stages."""
    taken = backbone_arguments(config)
    arguments: dict[str, Any] = dict(config.model_kwargs)
    default = tuple(model.encoder.backbone.pretrained_cfg["input_size"][1:])
    for name in ("img_size", "window_size") if config.size != default else ():
        if name in taken and name not in arguments:
            sides = taken[name]
            arguments[name] = sides[0] if sides[0] == sides[1] else list(sides)
    if config.channels != 3:
        arguments["in_chans"] = config.channels
    if depth is not None and depth != model.encoder.depths[-1]:
        arguments |= shallower(model.encoder.backbone, depth)
    return arguments


def timm_lines(folder: Path, config: Pretrain, model: MIM) -> str:
    """Three lines of Python that load the exported encoder in timm."""
    arguments = "".join(f", {key}={value!r}" for key, value in timm_arguments(config, model).items())
    return (
        "import timm, torch\n"
        f'model = timm.create_model("{config.model}", num_classes=0{arguments}, '
        f'checkpoint_path="{folder / "model.safetensors"}").eval()\n'
        f"features = model(torch.randn(1, {config.channels}, {config.size[0]}, {config.size[1]}))"
    )
