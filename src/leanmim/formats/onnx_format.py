"""ONNX: one file with graph and weights, for any number of images at a time, checked with onnxruntime.

b batch, c channels, H W pixels, n patches, d width.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from leanmim.config import Pretrain
from leanmim.config.base import Model
from leanmim.encoders.backbone import as_tokens
from leanmim.errors import UserError
from leanmim.formats.timm_format import describe
from leanmim.mim import MIM
from leanmim.start import Start
from leanmim.weights import truncated

TOLERANCE = 1e-4
"""Largest difference from torch, as a share of the largest output."""
LARGEST = 2**31
"""Bytes of one ONNX file; protobuf allows no more."""


class Features(nn.Module):
    """An encoder as a graph: the mean of its patch tokens, as `--pool avg` has it, and the tokens."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "b c H W"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Features and tokens."""
        tokens = as_tokens(self.backbone, self.backbone.forward_features(images))
        last = getattr(self.backbone, "fc_norm", nn.Identity())
        return last(tokens.mean(1)), tokens


def onnx_encoder(config: Pretrain, model: MIM, state: dict[str, Any], depth: int | None = None) -> dict[str, Any]:
    """An encoder: ``features`` and ``tokens`` of normalised ``images``.

    Args:
        config: of the run.
        model: of the run.
        state: its checkpoint.
        depth: only so many blocks or stages, the end of a segment; None is all.

    Raises:
        UserError: no segment ends at ``depth``, or as for `onnx_files`.
    """
    facts = describe(model.encoder.backbone, config, state)
    return onnx_files(Features(truncated(model.encoder, config, depth)), config, ["features", "tokens"], facts)


def onnx_classifier(start: Start, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A classifier: ``logits`` of normalised ``images``.

    Args:
        start: the fine-tuned run.
        model: its classifier.
        state: its checkpoint.

    Raises:
        UserError: as for `onnx_files`.
    """
    return onnx_files(model, start.model, ["logits"], describe(model, start.model, state, start.classes))


def onnx_files(module: nn.Module, own: Model, outputs: list[str], facts: dict[str, Any]) -> dict[str, Any]:
    """The graph, and what is known about it: the JSON is in the graph's metadata too.

    Args:
        module: from images to the outputs, in evaluation mode.
        own: its architecture.
        outputs: what they are called.
        facts: timm's description.

    Raises:
        UserError: a library is missing, the model is too large, torch cannot convert it, or onnxruntime computes something
            else.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError('--format onnx needs onnx, onnxscript and onnxruntime: pip install "leanmim[onnx]"') from error
    if sum(p.numel() * p.element_size() for p in module.state_dict().values()) >= LARGEST:
        raise UserError(f"{own.model} has 2 GiB of weights or more, too much for an ONNX file; use --format timm")
    known = facts["pretrained_cfg"]
    described = {"architecture": own.model, "outputs": outputs}
    described |= {key: known[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation")}
    described |= {"label_names": facts["label_names"]} if "label_names" in facts else {}

    noise = torch.Generator().manual_seed(0)
    batches = [torch.randn(b, own.channels, *own.size, generator=noise) for b in (1, 3)]
    module = module.eval()
    with torch.inference_mode():
        expected = [as_tuple(module(images)) for images in batches]
    graph = converted(module, own, outputs)
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in described.items()})
    content = graph.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for images, right in zip(batches, expected, strict=True):
        found = session.run(outputs, {"images": images.numpy()})
        for name, ours, theirs in zip(outputs, right, found, strict=True):
            worst = float(np.abs(theirs - ours.numpy()).max() / np.abs(ours.numpy()).max().clip(1e-12))
            if not worst <= TOLERANCE:
                raise UserError(
                    f"the {name} of {len(images)} images in onnxruntime {onnxruntime.__version__} differ from torch's by "
                    f"{worst:.1e} of the largest, more than {TOLERANCE:.0e}; nothing was written. Try other versions of "
                    "torch and onnxruntime, or --format timm"
                )
    return {"model.onnx": content, "config.json": described}


def onnx_loading(folder: Path, classifier: bool) -> str:
    """Python that runs an export."""
    outputs = "(logits,)" if classifier else "features, tokens"
    return (
        "  import onnxruntime\n"
        f"  session = onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})\n"
        f'  {outputs} = session.run(None, {{"images": images}})  # normalised, float32, batch x channels x height x width'
    )


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """One output, or several, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def converted(module: nn.Module, own: Model, outputs: list[str]) -> Any:
    """The graph of a model, as onnx.ModelProto.

    Raises:
        UserError: torch cannot convert it.
    """
    part: Any
    for part in module.modules():  # the exporter knows no fused attention within windows (Hiera)
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    images = torch.zeros(2, own.channels, *own.size)
    try:
        with quiet("torch.onnx", "onnxscript"), torch.no_grad():
            program = torch.onnx.export(
                module, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except Exception as error:  # torch's exporter raises many kinds
        first = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"torch {torch.__version__} cannot convert {own.model} to ONNX ({type(error).__name__}: {first}); use "
            "--format timm"
        ) from error
    assert program is not None
    return program.model_proto


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let these loggers report errors only: the exporter's other messages are about its own functions."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
