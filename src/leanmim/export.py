"""A run's encoder for other libraries.

timm: ``model.safetensors`` with the backbone's own keys, and timm's ``config.json``.
transformers: a folder for ViTMAEForPreTraining, encoder and decoder.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from leanmim.checkpoint import prefix, restore, write_atomically, write_json
from leanmim.config import Export, Pretrain
from leanmim.decoder import sincos
from leanmim.encoders import Prefix, ViTEncoder, backbone_arguments, create_backbone, shorter
from leanmim.errors import UserError
from leanmim.mim import MIM


def export(config: Export) -> Path:
    """Write a run's weights in another library's format.

    Returns:
        The folder; with ``all_depths`` the one that holds those of all depths.

    Raises:
        UserError: the run cannot be read, the format cannot hold this model, no segment ends at the depth, or files
            would be overwritten.
    """
    trained, model, state = restore(config.run)
    if config.all_depths:
        if config.depth is not None:
            raise UserError("--depth and --all-depths: give one of them")
        if config.format == "transformers":
            raise UserError("--all-depths: --format transformers writes whole models; use --format timm")
        ones = [
            replace(config, all_depths=False, depth=d, out=str(Path(config.out) / f"depth{d}") if config.out else None)
            for d in model.encoder.depths
        ]
        for one in ones:
            folder_of(one)  # speaks up before anything is written
        for one in ones:
            export(one)
        return Path(config.out) if config.out else Path(config.run) / "export"
    folder = folder_of(config)
    if config.format == "timm":
        files = to_timm(trained, model, state, config.depth)
    elif config.depth in (None, model.encoder.depths[-1]):
        files = to_transformers(trained, model, state)
    else:
        raise UserError("--depth: --format transformers writes whole models; use --format timm")
    if files["config.json"].get("leanmim", {}).get("not_pretrained"):
        print(
            f"timm does not build {trained.model} shorter: {folder} holds the whole model, its later stages untrained "
            "(not_pretrained in config.json)",
            file=sys.stderr,
        )
    for name, content in files.items():
        if name.endswith(".safetensors"):
            tensors = {key: value.detach().contiguous().clone() for key, value in content.items()}
            write_atomically(folder / name, partial(save_file, tensors, metadata={"format": "pt"}))
        else:
            write_json(folder / name, content)
    return folder


def folder_of(config: Export) -> Path:
    """Where the files go.

    Raises:
        UserError: something is there that the user did not ask to overwrite.
    """
    name = config.format + (f"-depth{config.depth}" if config.depth is not None else "")
    folder = Path(config.out) if config.out else Path(config.run) / "export" / name
    if config.out and not config.overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} is not empty; choose another --out, or --overwrite")
    if folder.is_file():
        raise UserError(f"{str(folder)!r} is a file; --out takes a folder")
    return folder


def timm_arguments(config: Pretrain, model: MIM, depth: int | None = None) -> dict[str, Any]:
    """What timm.create_model needs beside the name to build the model as it was pre-trained, or its first blocks."""
    taken = backbone_arguments(config.model, config.size, config.channels, **config.model_kwargs)
    arguments: dict[str, Any] = dict(config.model_kwargs)
    default = tuple(model.encoder.backbone.pretrained_cfg["input_size"][1:])
    for name in ("img_size", "window_size") if config.size != default else ():
        if name in taken and name not in arguments:
            sides = taken[name]
            arguments[name] = sides[0] if sides[0] == sides[1] else list(sides)
    if config.channels != 3:
        arguments["in_chans"] = config.channels
    if depth is not None and depth != model.encoder.depths[-1]:
        arguments |= shorter(model.encoder.backbone, depth)
    return arguments


def to_timm(config: Pretrain, model: MIM, state: dict[str, Any], depth: int | None = None) -> dict[str, Any]:
    """The backbone's state and timm's description of it; loads strictly with timm.create_model.

    Args:
        config: of the run.
        model: of the run.
        state: its checkpoint.
        depth: only so many blocks or stages, the end of a segment. A family that timm cannot build shorter is written
            whole, its later stages initialised afresh, and the description says so.
    """
    short = prefix(model.encoder, config, depth)
    backbone = short.backbone if isinstance(short, Prefix) else short
    taken = backbone_arguments(config.model, config.size, config.channels, **config.model_kwargs)
    description: dict[str, Any] = {
        "architecture": config.model.partition(".")[0],
        "num_classes": 0,
        "num_features": (model.encoder.backbone if isinstance(short, Prefix) else backbone).num_features,
        "model_args": timm_arguments(config, model, depth),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.channels, *config.size],
            "fixed_input_size": "img_size" in taken,  # timm gives it to those models only
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
    weights = backbone.state_dict()
    left = config.depth if short is model.encoder.backbone else None  # a model of its own lacks nothing
    layers = (depth or config.depth) if isinstance(short, Prefix) else left
    if layers is not None:
        # the model whole, so that it loads anywhere: what pre-training left out is initialised afresh, and said so
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            whole = create_backbone(
                config.model, config.size, config.channels, None, **config.model_kwargs
            ).state_dict()
        description["leanmim"] |= {"depth": layers, "not_pretrained": sorted(whole.keys() - weights.keys())}
        weights = whole | weights
    return {"model.safetensors": weights, "config.json": description}


def timm_lines(folder: Path, config: Pretrain, model: MIM) -> str:
    """Three lines of Python that load the exported encoder in timm."""
    arguments = "".join(f", {key}={value!r}" for key, value in timm_arguments(config, model).items())
    return (
        "import timm, torch\n"
        f'model = timm.create_model("{config.model}", num_classes=0{arguments}, '
        f'checkpoint_path="{folder / "model.safetensors"}").eval()\n'
        f"features = model(torch.randn(1, {config.channels}, {config.size[0]}, {config.size[1]}))"
    )


def to_transformers(config: Pretrain, model: MIM, state: dict[str, Any]) -> dict[str, Any]:
    """A folder for transformers' ViTMAEForPreTraining.

    Raises:
        UserError: the run is not a MAE of a plain ViT as ViTMAE knows it.
    """
    encoder = model.encoder
    vit = encoder.backbone
    block = vit.blocks[0] if isinstance(encoder, ViTEncoder) else None
    demands = {
        "--masking drop": config.masking == "drop",
        "a plain ViT": block is not None,
        "a class token and no register tokens": block is not None
        and vit.has_class_token
        and vit.num_prefix_tokens == 1,
        "a final norm before the pooling": block is not None and not isinstance(vit.norm, torch.nn.Identity),
        "positions for the class token": block is not None and vit.pos_embed is not None and not vit.no_embed_class,
        "a plain attention with biases": block is not None
        and block.attn.qkv.bias is not None
        and isinstance(block.attn.q_norm, torch.nn.Identity)
        and isinstance(block.ls1, torch.nn.Identity),
        "no norm before the first block": block is not None and isinstance(vit.norm_pre, torch.nn.Identity),
        "a square input": config.size[0] == config.size[1],
        "pixels as target": config.target != "hog",
        "squared error": config.loss == "l2",
        "one decoder (no --segments)": len(model.decoders) == 1,
        "a decoder for all masked patches (no --throw)": not config.throw,
    }
    if lacking := [what for what, met in demands.items() if not met]:
        raise UserError(
            f"--format transformers writes ViTMAE, which needs {'; '.join(lacking)}. This run can be exported with "
            "--format timm"
        )
    assert block is not None
    description = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": vit.norm.eps,
        "image_size": config.size[0],
        "patch_size": encoder.stride,
        "num_channels": config.channels,
        "qkv_bias": True,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_intermediate_size": 4 * config.decoder_width,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.target == "pixels",
        "torch_dtype": "float32",
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.size[0], "width": config.size[1]},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": state["mean"],
        "image_std": state["std"],
    }
    return {
        "model.safetensors": vit_mae_state(model),
        "config.json": description,
        "preprocessor_config.json": preprocessor,
    }


def vit_mae_state(model: MIM) -> dict[str, Tensor]:
    """The weights under ViTMAE's key names, query, key and value split."""
    vit = model.encoder.backbone
    decoder: Any = model.decoders[0]
    state = {
        "vit.embeddings.cls_token": vit.cls_token,
        "vit.embeddings.position_embeddings": vit.pos_embed,
        "vit.embeddings.patch_embeddings.projection.weight": vit.patch_embed.proj.weight,
        "vit.embeddings.patch_embeddings.projection.bias": vit.patch_embed.proj.bias,
        "vit.layernorm.weight": vit.norm.weight,
        "vit.layernorm.bias": vit.norm.bias,
        "decoder.mask_token": decoder.mask_token,
        "decoder.decoder_pos_embed": torch.nn.functional.pad(
            sincos(model.encoder.grid, decoder.mask_token.shape[-1]), (0, 0, 1, 0)
        )[None],
        "decoder.decoder_embed.weight": decoder.embed.weight,
        "decoder.decoder_embed.bias": decoder.embed.bias,
        "decoder.decoder_norm.weight": decoder.norm.weight,
        "decoder.decoder_norm.bias": decoder.norm.bias,
        "decoder.decoder_pred.weight": decoder.head.weight,
        "decoder.decoder_pred.bias": decoder.head.bias,
    }
    names = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for start, blocks in (("vit.encoder.layer", vit.blocks), ("decoder.decoder_layers", decoder.layers)):
        for i, block in enumerate(blocks):
            for end in ("weight", "bias"):
                qkv = getattr(block.attn.qkv, end).chunk(3)
                for name, part in zip(("query", "key", "value"), qkv, strict=True):
                    state[f"{start}.{i}.attention.attention.{name}.{end}"] = part
                for ours, theirs in names.items():
                    state[f"{start}.{i}.{theirs}.{end}"] = getattr(block.get_submodule(ours), end)
    return state
