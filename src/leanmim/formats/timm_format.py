"""timm: ``model.safetensors`` with the model's own keys, and timm's ``config.json``."""

from pathlib import Path
from typing import Any

import torch

from leanmim.config import Pretrain
from leanmim.config.base import Model, Stored
from leanmim.data.crops import kept_share
from leanmim.encoders.backbone import Backbone, Truncated, backbone_arguments, backbone_of, shallower
from leanmim.mim import MIM
from leanmim.start import Start
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
    arguments, weights = timm_arguments(config, model.encoder.backbone), backbone.state_dict()
    if depth is not None and depth != model.encoder.depths[-1]:
        arguments |= shallower(model.encoder.backbone, depth)
    if trained_depth is None:
        return {
            "model.safetensors": weights,
            "config.json": describe(backbone, config, state) | {"model_args": arguments},
        }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        whole = backbone_of(config)
    description = describe(whole, config, state) | {"model_args": arguments}
    fresh = sorted(whole.state_dict().keys() - weights.keys())
    description["leanmim"] |= {"depth": trained_depth, "not_pretrained": fresh}
    return {"model.safetensors": whole.state_dict() | weights, "config.json": description}


def timm_classifier(start: Start, model: Backbone, state: dict[str, Any]) -> dict[str, Any]:
    """The weights of a classifier, head included, and timm's description of it with the names of the classes.

    Args:
        start: the fine-tuned run.
        model: its classifier.
        state: its checkpoint.
    """
    description = describe(model, start.model, state, start.classes)
    description["model_args"] = timm_arguments(start.model, model)
    return {"model.safetensors": model.state_dict(), "config.json": description}


def describe(backbone: Backbone, own: Model, state: dict[str, Any], classes: tuple[str, ...] = ()) -> dict[str, Any]:
    """timm's description of a model, but for the arguments that make it.

    Args:
        backbone: the model.
        own: its architecture.
        state: the checkpoint of its run.
        classes: what its head tells apart, if it has one.
    """
    trained = state["config"]
    crop = kept_share(own.size, trained.get("crop"))
    known: dict[str, Any] = {
        "custom_load": False,
        "input_size": [own.channels, *own.size],
        "fixed_input_size": "img_size" in backbone_arguments(own),  # timm gives it to those models only
        "interpolation": "bicubic",
        "crop_pct": crop,
        "crop_mode": "center",
        "mean": state["mean"],
        "std": state["std"],
        "num_classes": len(classes),
        "first_conv": backbone.pretrained_cfg["first_conv"],
        "classifier": backbone.pretrained_cfg["classifier"],
    }
    description: dict[str, Any] = {
        "architecture": own.model.partition(".")[0],
        "num_classes": len(classes),
        "num_features": backbone.num_features,
        "pretrained_cfg": known,
        "leanmim": {"recipe": trained.get("recipe"), "step": state["step"], "epochs": trained.get("epochs")},
    }
    if isinstance(own.read_as, Stored):
        description["leanmim"]["values"] = "stored"
    if classes:
        description["label_names"] = list(classes)
    if isinstance(pool := getattr(backbone, "global_pool", None), str):  # elsewhere it is a module, or the head's
        description["global_pool"] = pool
    return description


def timm_arguments(own: Model, backbone: Backbone) -> dict[str, Any]:
    """What timm.create_model needs beside the name to build a model of this architecture."""
    taken = backbone_arguments(own)
    arguments: dict[str, Any] = dict(own.model_kwargs)
    default = tuple(backbone.pretrained_cfg["input_size"][1:])
    for name in ("img_size", "window_size") if own.size != default else ("window_size",):
        if name in taken and name not in arguments:
            sides = taken[name]
            arguments[name] = sides[0] if sides[0] == sides[1] else list(sides)
    if own.channels != 3:
        arguments["in_chans"] = own.channels
    return arguments


def timm_lines(file: Path, description: dict[str, Any]) -> str:
    """Three lines of Python that load an exported model in timm.

    Args:
        file: the weights.
        description: what is written beside them.
    """
    known = {"num_classes": description["num_classes"], **description["model_args"], "checkpoint_path": str(file)}
    arguments = ", ".join(f"{key}={value!r}" for key, value in known.items())
    channels, height, width = description["pretrained_cfg"]["input_size"]
    result = "logits" if description["num_classes"] else "features"
    return (
        "import timm, torch\n"
        f'model = timm.create_model("{description["architecture"]}", {arguments}).eval()\n'
        f"{result} = model(torch.randn(1, {channels}, {height}, {width}))"
    )


def timm_loading(folder: Path, classifier: bool) -> str:
    """Python that loads an export: the model, its maps, a pyramid of them."""
    there = repr(f"local-dir:{folder}")
    head = "" if classifier else ", num_classes=0"
    return (
        "  import leanmim, timm\n"
        f"  model = timm.create_model({there}, pretrained=True{head})\n"
        f"  maps = timm.create_model({there}, pretrained=True, features_only=True)  # of every stage; of a ViT the last three blocks\n"
        f"  pyramid = leanmim.pyramid({str(folder)!r})  # for detection and segmentation; of maps of 4, 8, 16, 32 px, or one of them"
    )
