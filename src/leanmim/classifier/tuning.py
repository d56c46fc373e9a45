"""Model, optimizer and moving average of a fine-tuning, from one step to the next.

b batch, c channels, H W pixels, k classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW

from leanmim.classifier.groups import decayed_groups
from leanmim.classifier.model import Made
from leanmim.config import Finetune
from leanmim.data import seed_of
from leanmim.device import resolve_precision
from leanmim.encoders.backbone import Backbone
from leanmim.processes import ALONE, Process
from leanmim.schedule import learning_rate
from leanmim.step import load_state, update
from leanmim.train.non_finite import first_not_finite, running_statistics, undo
from leanmim.weights import check_shapes

Batch = tuple[Float[Tensor, "b c H W"], Float[Tensor, "b k"]]  # normalised images, soft targets


class Losses(nn.Module):
    """The loss of a batch, as `update` asks for it: an iterator of one.

    Args:
        model: a classifier.
        weights: of the classes, or None.
        autocast: dtype of the forward pass, or None for float32.
    """

    def __init__(self, model: nn.Module, weights: Float[Tensor, " k"] | None, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.weights, self.autocast = model, weights, autocast

    def forward(self, batch: Batch) -> Iterator[Float[Tensor, ""]]:
        """Cross-entropy with soft targets, in float32; a class counts by its weight."""
        images, targets = batch
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.model(images)
        yield nn.functional.cross_entropy(logits.float(), targets, weight=self.weights)


def make_optimizer(model: Backbone, config: Finetune) -> AdamW:
    """AdamW with layer decay; its numbers are resolved."""
    fused = next(model.parameters()).device.type != "mps"
    groups = decayed_groups(model, float(config.layer_decay))
    return AdamW(groups, lr=0.0, betas=config.betas, weight_decay=float(config.weight_decay), fused=fused)


class Tuning:
    """What a fine-tuning trains.

    Args:
        config: of the run; no value is ``auto``.
        made: the classifier before its first step, on the device.
        per_epoch: steps.
        weights: of the classes, or None.
        device: where to train.
        process: this one among all.
    """

    def __init__(
        self,
        config: Finetune,
        made: Made,
        per_epoch: int,
        weights: Float[Tensor, " k"] | None,
        device: torch.device,
        process: Process = ALONE,
    ) -> None:
        self.config, self.per_epoch, self.device, self.process = config, per_epoch, device, process
        self.model = made.model.train()
        if config.channels_last is True:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, config)
        decay = float(config.ema)
        self.average = ModelEmaV3(self.model, decay=decay, use_warmup=True) if decay else None
        self.done = 0  # steps, on which the average's warm-up depends
        if config.compile is True:
            self.model.compile(dynamic=False)
        weights = None if weights is None else weights.to(device)
        self.losses = Losses(self.model, weights, resolve_precision(config.precision, device))

    @property
    def images(self) -> int:
        """Of a step, over all processes."""
        return int(self.config.batch_size) * self.config.accum * self.process.world

    def set_learning_rate(self, step: int) -> float:
        """Set that of a step, of each layer its own, and return that of the head."""
        config = self.config
        epoch, least = step / self.per_epoch, float(config.min_lr)
        peak = float(config.blr) * self.images / 256
        lr = learning_rate(epoch, float(config.epochs), config.warmup, peak, config.schedule)
        if epoch >= config.warmup and peak:
            lr = least + lr * (peak - least) / peak
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def step(self, step: int, batches: Iterator[Batch]) -> Float[Tensor, " 1"]:
        """One update from ``accum`` batches; drop path depends on seed, process and step only."""
        accum, running = self.config.accum, running_statistics(self.model)
        before = [value.clone() for value in running]
        if self.process.world > 1:  # running statistics, as DistributedDataParallel has them
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        clip_grad = float(self.config.clip_grad)
        loss = update(self.losses, [self.optimizer], batches, accum, clip_grad, self.seeds(step))
        undo(running, before, loss)
        self.done = step + 1
        if self.average is not None:
            self.average.update(self.model, step=self.done)
        return loss

    def seeds(self, step: int) -> list[int]:
        """Of a step's batches in this process."""
        return [seed_of(self.config.seed, self.process.rank, step, micro) for micro in range(self.config.accum)]

    def diagnose(self, step: int, batches: Iterator[Batch]) -> str:
        """What in a step is not finite first, given its batches again."""
        return first_not_finite(self.model, self.losses, batches, self.seeds(step))

    @contextmanager
    def evaluated(self) -> Iterator[Callable[[Tensor], Float[Tensor, "b k"]]]:
        """The function from normalised images to logits: of the moving average where there is one."""
        model = self.model if self.average is None else self.average.module
        self.model.eval()

        @torch.inference_mode()
        def logits(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.losses.autocast, enabled=self.losses.autocast is not None):
                return model(images).float()

        yield logits
        self.model.train()

    def weights(self) -> dict[str, Tensor]:
        """Those that are evaluated and kept."""
        return (self.model if self.average is None else self.average.module).state_dict()

    def take(self, weights: dict[str, Tensor]) -> None:
        """Let others than its own be evaluated; training ends with it."""
        (self.model if self.average is None else self.average.module).load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this."""
        average = {} if self.average is None else {"average": self.average.module.state_dict()}
        return {"model": self.model.state_dict(), "optimizers": [self.optimizer.state_dict()], **average}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        check_shapes(self.model, state["model"], self.config.out)
        self.model.load_state_dict(state["model"])
        load_state([self.optimizer], state["optimizers"])
        self.done = state["step"]
        if self.average is not None:
            average = state.get("average", {})
            check_shapes(self.average.module, average, self.config.out)
            self.average.module.load_state_dict(average)
