"""What a step of fine-tuning costs, counted as one of pre-training: the real step on fake tensors."""

from dataclasses import replace

import torch

from leanmim.classifier.model import Made
from leanmim.classifier.tuning import Tuning
from leanmim.config import Finetune
from leanmim.config.base import Model
from leanmim.costs import StepCost
from leanmim.costs.counting import follow_all, peaks, watched, with_state
from leanmim.costs.flops import Flops, flop_counter
from leanmim.encoders.backbone import backbone_of
from leanmim.fake import fake_tensors
from leanmim.step import update


def count_tuning(
    config: Finetune, architecture: Model, classes: int, device: str = "cpu"
) -> tuple[StepCost, dict[str, Flops]]:
    """The cost of a step of fine-tuning, accumulation included.

    Args:
        config: resolved; batch size and accumulation count.
        architecture: of the classifier.
        classes: how many.
        device: ``cpu`` or ``cuda``; the machine need not have it.

    Returns:
        The cost, and the FLOPs of an image: ``forward`` and ``training``, all of the encoder.
    """
    cuda, batch, accum = device == "cuda", int(config.batch_size), min(config.accum, 2)
    if cuda and config.precision == "auto" and not torch.cuda.is_available():
        config = replace(config, precision="bf16")
    backbone = backbone_of(architecture, num_classes=classes, drop_path_rate=float(config.drop_path), device="meta")
    with fake_tensors():
        made = Made(backbone.to_empty(device="cpu"), architecture, [])
        tuning = Tuning(replace(config, compile=False, ema=0.0), made, 1, None, torch.device("cpu"))
        storages = follow_all(tuning.model, with_state([tuning.optimizer], tuning.model), cuda)
        average = [tensor.clone() for tensor in tuning.model.state_dict().values() if config.ema]
        for tensor in average:
            storages.follow(tensor, "weights")
        forward, counter = flop_counter(), flop_counter()
        images = torch.empty(batch, architecture.channels, *architecture.size)
        with forward:
            tuning.model(images)
        data = ((images.clone(), torch.empty(batch, classes)) for _ in range(accum))
        with watched(tuning.model, storages, counter, cuda):
            update(tuning.losses, [tuning.optimizer], data, accum, float(config.clip_grad))
    flops = {
        "forward": {"encoder": forward.get_total_flops() // batch},
        "training": {"encoder": counter.get_total_flops() // (batch * accum)},
    }
    parameters = sum(p.numel() for p in tuning.model.parameters())
    cost = StepCost(
        title=f"finetune {config.recipe}",
        recipe=config.recipe,
        model=architecture.model,
        batch_size=batch,
        forward_flops_per_image=flops["forward"]["encoder"],
        train_flops_per_image=flops["training"]["encoder"],
        segment_flops=(flops["training"]["encoder"],),
        segment_parameters=(parameters,),
        message_bytes=0,
        encoder_parameters=parameters,
        decoder_parameters=0,
        encoder_tokens=0,
        decoder_tokens=0,
        input_sizes=(architecture.size,),
        **peaks(storages, cuda),
    )
    return cost, flops
