"""What `show` draws, for tests to look at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leanmim.config import Pretrain
from tests.helpers import fake_run


def run_of(config: Pretrain) -> Path:
    """A run folder in the place that the configuration names."""
    return Path(fake_run(config, Path(config.out)).out)


class Drawn:
    """What was put on the figure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures: list[np.ndarray] = []
        self.texts: list[str] = []
        imshow = Axes.imshow

        def keep(axes: Axes, picture: np.ndarray, **options: Any) -> Any:
            self.pictures.append(np.asarray(picture))
            return imshow(axes, picture, **options)

        monkeypatch.setattr(Axes, "imshow", keep)
        for kind, name in ((Axes, "set_title"), (Axes, "set_xlabel"), (Figure, "supxlabel")):
            monkeypatch.setattr(kind, name, self.noting(getattr(kind, name)))

    def noting(self, method: Any) -> Any:
        def note(what: Any, text: str, **options: Any) -> Any:
            self.texts.append(text)
            return method(what, text, **options)

        return note

    @property
    def rows(self) -> list[list[np.ndarray]]:
        return [self.pictures[i : i + 3] for i in range(0, len(self.pictures), 3)]


def names(drawn: Drawn) -> list[str]:
    return [text for text in drawn.texts if text.endswith((".jpg", ".png", "..."))]
