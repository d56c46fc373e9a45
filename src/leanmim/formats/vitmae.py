"""transformers: a folder for ViTMAEForPreTraining, encoder and decoder."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanmim.config import Pretrain
from leanmim.decoder import sincos
from leanmim.encoders import ViTEncoder
from leanmim.errors import UserError
from leanmim.mim import MIM


def vitmae_files(config: Pretrain, model: MIM, state: dict[str, Any], depth: int | None = None) -> dict[str, Any]:
    """Weights, configuration and preprocessor for transformers' ViTMAEForPreTraining.

    Args:
        config: of the run.
        model: of the run.
        state: its checkpoint.
        depth: that of the whole model, or None.

    Raises:
        UserError: the run is not a MAE of a plain ViT as ViTMAE knows it.
    """
    assert depth in (None, model.encoder.depths[-1])
    if lacking := [demand for demand, met in demands(config, model).items() if not met]:
        raise UserError(
            f"--format transformers writes ViTMAE, which needs {'; '.join(lacking)}. This run can be exported with "
            "--format timm"
        )
    return {
        "model.safetensors": vitmae_weights(model),
        "config.json": describe(config, model),
        "preprocessor_config.json": {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": config.size[0], "width": config.size[1]},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": state["mean"],
            "image_std": state["std"],
        },
    }


def demands(config: Pretrain, model: MIM) -> dict[str, bool]:
    """What ViTMAE needs of a run, and whether the run meets it."""
    found = {
        "--masking drop": config.masking == "drop",
        "a square input": config.size[0] == config.size[1],
        "pixels as target": config.target in ("pixels", "raw-pixels"),
        "squared error": config.loss == "l2",
        "one decoder (no --segments)": len(model.decoders) == 1,
        "a decoder for all masked patches (no --throw)": not config.throw,
        "a plain ViT": isinstance(model.encoder, ViTEncoder),
    }
    if not isinstance(model.encoder, ViTEncoder):
        return found
    vit = model.encoder.backbone
    block = vit.blocks[0]
    return found | {
        "a class token and no register tokens": vit.has_class_token and vit.num_prefix_tokens == 1,
        "a final norm before the pooling": not isinstance(vit.norm, nn.Identity),
        "positions for the class token": vit.pos_embed is not None and not vit.no_embed_class,
        "a plain attention with biases": block.attn.qkv.bias is not None
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(block.ls1, nn.Identity),
        "no norm before the first block": isinstance(vit.norm_pre, nn.Identity),
    }


def describe(config: Pretrain, model: MIM) -> dict[str, Any]:
    """transformers' configuration of the model."""
    vit = model.encoder.backbone
    block = vit.blocks[0]
    decoder: Any = model.decoders[0]
    width = decoder.mask_token.shape[-1]
    return {
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
        "patch_size": model.encoder.stride,
        "num_channels": config.channels,
        "qkv_bias": True,
        "decoder_num_attention_heads": decoder.layers[0].attn.num_heads,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": len(decoder.layers),
        "decoder_intermediate_size": 4 * width,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.target == "pixels",
        "torch_dtype": "float32",
    }


def vitmae_weights(model: MIM) -> dict[str, Tensor]:
    """The weights under ViTMAE's names, with query, key and value apart."""
    vit = model.encoder.backbone
    decoder: Any = model.decoders[0]
    positions = sincos(model.encoder.grid, decoder.mask_token.shape[-1])
    weights = {
        "vit.embeddings.cls_token": vit.cls_token,
        "vit.embeddings.position_embeddings": vit.pos_embed,
        "vit.embeddings.patch_embeddings.projection.weight": vit.patch_embed.proj.weight,
        "vit.embeddings.patch_embeddings.projection.bias": vit.patch_embed.proj.bias,
        "vit.layernorm.weight": vit.norm.weight,
        "vit.layernorm.bias": vit.norm.bias,
        "decoder.mask_token": decoder.mask_token,
        "decoder.decoder_pos_embed": nn.functional.pad(positions, (0, 0, 1, 0))[None],  # 0 for the class token
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
                    weights[f"{start}.{i}.attention.attention.{name}.{end}"] = part
                for ours, theirs in names.items():
                    weights[f"{start}.{i}.{theirs}.{end}"] = getattr(block.get_submodule(ours), end)
    return weights


def vitmae_loading(folder: Path, classifier: bool) -> str:
    """Python that loads an export; there are none of classifiers."""
    return (
        "  from transformers import ViTMAEForPreTraining\n"
        f"  model = ViTMAEForPreTraining.from_pretrained({str(folder)!r})"
    )
