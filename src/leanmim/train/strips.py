"""Pictures over training time: what is reconstructed of the same few images as training goes on."""

import torch
from torch import Tensor

from leanmim.config import Pretrain
from leanmim.data import Source, centre_crop
from leanmim.errors import CannotWrite
from leanmim.loop import Loop
from leanmim.pictures.images import read_some
from leanmim.pictures.over_time import write_strip
from leanmim.train.training import Training

COUNT = 4  # images


class Strips:
    """Draws a strip when one is due. Images and masks are always the same; in a phase of another input size, those of that size.

    Args:
        config: of the run.
        source: the images.
        steps: of the whole run.
    """

    def __init__(self, config: Pretrain, source: Source, steps: int) -> None:
        self.every, self.seed, self.source, self.steps = config.show_every, config.seed, source, steps
        self.doubling = {0, *(steps >> halved for halved in range(7))}
        self.read: dict[tuple[int, int], Tensor] = {}  # by their size

    def due(self, step: int, epoch: float) -> bool:
        """Whether a strip is drawn after so many steps."""
        if self.every == "auto":
            return step in self.doubling
        return bool(self.every) and (epoch % self.every == 0 or step == self.steps)

    def draw(self, training: Training, loop: Loop, epoch: float) -> None:
        """Draw a strip if it is due, in the first process; it is no time of training."""
        if not self.due(loop.done, epoch):
            return
        with loop.paused(), training.placement.whole() as model:
            if not loop.process.first:
                return
            own, path = training.phase.config, loop.run.strip(loop.done)
            if own.size not in self.read:
                found = list(read_some(self.source, COUNT, centre_crop(own.size)).values())
                self.read[own.size] = torch.stack(found) if found else torch.empty(0)
            pictures = self.read[own.size]
            try:
                drawn = len(pictures) and write_strip(path, own, model, training.normalise, pictures, self.seed)
            except CannotWrite as error:
                return loop.tell_fault("picture", error)
            if drawn:
                loop.picture("reconstructions_over_time", path)
