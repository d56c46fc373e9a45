"""Tiny models and the photos that the project ships: no network, no GPU."""

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from huggingface_hub import constants

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}  # the same on every machine; xdist runs one test a core

import torch
from timm import create_model

from leanmim import config as configurations
from leanmim import costs, planner, weights
from leanmim.cli import main
from leanmim.comparison import plan
from leanmim.config import Config, Pretrain
from leanmim.config.tools import COUNTS
from leanmim.recipes import MAE, SIMMIM
from leanmim.train import pretrain as pretraining
from leanmim.train import right_size
from tests.formats.hub import TOKEN, Hub, serving
from tests.helpers import PHOTOS, PLAIN
from tests.runs import Refused

torch.set_num_threads(1)
matplotlib.rcParams["savefig.dpi"] = 20  # every run ends with a picture; tests of pictures draw them whole
COUNTS["reconstructions"] = 1
for _kind in vars(configurations).values():  # they take more than they declare, and check it
    if inspect.isclass(_kind) and issubclass(_kind, Config):
        _kind.__init__ = inspect.unwrap(_kind.__init__)  # type: ignore[method-assign]


@pytest.fixture
def whole_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn at the size that a user sees."""
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", "figure")
    monkeypatch.setitem(COUNTS, "reconstructions", 8)


@pytest.fixture(autouse=True)
def only_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-training ends with its last checkpoint. The export, picture and page that follow are for tests marked ``results``."""
    if not request.node.get_closest_marker("results"):
        monkeypatch.setattr(pretraining, "write_results", lambda run, loop: None)


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, called once for a configuration, whatever its folders and seed."""
    known: dict[str, Any] = {}

    def looked_up(config: Pretrain, *rest: str) -> Any:
        key = repr((replace(config, data="", out="", knn_data="", seed=0), rest))
        if key not in known:
            known[key] = function(config, *rest)
        return known[key]

    return looked_up


@pytest.fixture(autouse=True, scope="session")
def counted_once() -> Iterator[None]:
    """Every run counts what a step costs, and looks at models without memory. Tests of the counting do not go this way."""
    with pytest.MonkeyPatch.context() as patch:
        count = once(costs.count)
        for module in (pretraining, right_size, planner, plan):
            patch.setattr(module, "count", count)
        patch.setattr(right_size, "untrained_encoder", once(right_size.untrained_encoder))
        patch.setattr(weights, "without_memory", once(weights.without_memory))
        yield


@pytest.fixture
def photos() -> Path:
    return PHOTOS


@pytest.fixture
def tiny(tmp_path: Path) -> Pretrain:
    """A MAE that trains in about a second."""
    return replace(
        MAE,
        data=str(PHOTOS),
        out=str(tmp_path / "run"),
        model="vit_tiny_patch16_224",
        model_kwargs=PLAIN,
        input_size=(32,),
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
        epochs=2,
        batch_size=4,
        effective_batch=4,
        blr=1.5e-4,
        workers=0,
        device="cpu",
        log_every=1,
        show_every=0,
    )


@pytest.fixture
def tiny_simmim(tiny: Pretrain) -> Pretrain:
    """A SimMIM that trains in about a second."""
    return replace(
        SIMMIM,
        **{
            name: getattr(tiny, name)
            for name in (
                "data",
                "out",
                "model",
                "model_kwargs",
                "epochs",
                "batch_size",
                "effective_batch",
                "blr",
                "workers",
                "device",
                "log_every",
                "show_every",
            )
        },
        input_size=(64,),
        mask_unit=16,
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """In place of huggingface.co, with a login."""
    with serving(Hub()) as own:
        monkeypatch.setattr(constants, "ENDPOINT", own.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield own


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must end with one message and exit code 2; the message."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("leanmim: ")
        assert err.count("leanmim: ") == 1
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the output were a terminal of 80 columns."""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def clutter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what people pass by mistake."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "a.jpg.pt"):
        (tmp_path / "texts" / name).write_text("no picture, no checkpoint")
    weights = create_model(
        "vit_tiny_patch16_224", patch_size=4, img_size=8, embed_dim=8, depth=1, num_heads=1
    ).state_dict()
    torch.save(weights, tmp_path / "foreign.pt")
    torch.save(weights, tmp_path / "foreign.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that no core waits for it at the end."""
    items.sort(key=lambda item: "the_readmes_commands" not in item.nodeid)
