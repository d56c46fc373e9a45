"""Checkpoints: what is damaged or a stranger's is refused with one message, and the last good one stays."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from leanmim import files
from leanmim.checkpoint import all_of, is_ours, load, save
from leanmim.config import Pretrain
from leanmim.errors import CannotWrite, Damaged, UserError
from leanmim.run import Run
from leanmim.weights import restore
from tests.helpers import equal
from tests.manipulated import manipulated
from tests.runs import untrained


@pytest.fixture
def last(tiny: Pretrain) -> Path:
    return Run(untrained(tiny)).last


def test_a_flipped_bit_is_refused_or_changes_nothing(last: Path) -> None:
    good, whole, draw = load(last), last.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(100):
        place = draw.randrange(8 * len(whole))
        torn = bytearray(whole)
        torn[place // 8] ^= 1 << place % 8
        last.write_bytes(torn)
        try:
            assert equal(load(last), good), place
        except UserError:
            refused += 1
    assert refused > 80


def test_the_ones_before_are_kept(tmp_path: Path, last: Path) -> None:
    state = load(last)
    for step in range(5):
        save(last, {**state, "step": step}, keep=3)
    assert [(file.name, load(file)["step"]) for file in all_of(last)] == [
        ("last.pt", 4),
        ("last-1.pt", 3),
        ("last-2.pt", 2),
    ]
    save(last, {**state, "step": 5}, keep=2)
    assert [file.name for file in all_of(last)] == ["last.pt", "last-1.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_at_no_moment_is_there_no_good_one(links: bool, last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before any call that changes the folder."""
    state, moment, calls = load(last), 0, 0

    def stopping(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise KeyboardInterrupt
            if name == "link" and not links:
                raise OSError(errno.EPERM, "no links here")
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "fsync"):
            patch.setattr(os, name, stopping(name, getattr(os, name)))
        patch.setattr(Path, "unlink", stopping("unlink", Path.unlink))
        for moment in range(1, 30):
            calls, before = 0, max(load(file)["step"] for file in all_of(last))
            try:
                save(last, {**state, "step": moment}, keep=3)
            except KeyboardInterrupt:
                assert max(load(file)["step"] for file in all_of(last)) >= before
                assert last.is_file() or not links
            else:
                break
    assert 4 < moment < 29


def test_a_weight_that_is_not_finite_is_neither_written_nor_read(last: Path) -> None:
    state, before = load(last), last.read_bytes()
    name = next(iter(state["model"]))
    state["model"][name].view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=rf"the weight {name} is not finite: nothing is written"):
        save(last, state)
    assert last.read_bytes() == before and [file.name for file in last.parent.iterdir()] == ["last.pt"]
    torch.save(state, last)
    with pytest.raises(Damaged, match=rf"the weight {name} is not finite"):
        load(last)


def test_a_newer_format_is_refused_by_name(last: Path) -> None:
    torch.save({**load(last), "format": "leanmim-3"}, last)
    with pytest.raises(UserError, match=r"format leanmim-3, which leanmim .* does not know"):
        load(last)


def test_manipulated_checkpoints_are_refused_or_read(last: Path) -> None:
    """Some of each kind; `benchmarks/trust.py` tries more."""
    kinds = list(manipulated(load(last)))
    assert len(kinds) > 300
    folder = last.parent.parent
    for name, made in random.Random(1).sample(kinds, 40):
        torch.save(made(), last)
        try:
            restore(folder)
        except UserError:
            continue
        except Exception as error:
            pytest.fail(f"{name}: {error!r}")


def test_a_configuration_cannot_load_files(last: Path) -> None:
    state = load(last)
    for name in ("pretrained", "checkpoint_path"):
        config = state["config"] | {"model_kwargs": state["config"]["model_kwargs"] | {name: "x"}}
        torch.save({**state, "config": config}, last)
        with pytest.raises(UserError, match=name):
            load(last)
    torch.save({**state, "config": state["config"] | {"model": "hf-hub:a/b"}}, last)
    with pytest.raises(UserError, match="hf-hub"):
        load(last)


def test_ours_is_told_by_content(last: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save({"model": {"weight": torch.zeros(3)}}, other)
    assert is_ours(last) and not is_ours(other)
    assert is_ours(last.rename(tmp_path / "ours.pth"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_fault_of_the_disk_leaves_the_last_one(number: int, last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, before = load(last), last.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CannotWrite, match=rf"cannot be written: {os.strerror(number)} \(it takes .* MiB are free\)"):
        save(last, state)
    assert last.read_bytes() == before and [file.name for file in last.parent.iterdir()] == ["last.pt"]


def test_a_limit_on_the_size_of_files(last: Path) -> None:
    """Really; torch tells of it by another error."""
    before = last.read_bytes()
    code = (
        "import resource, sys; from pathlib import Path; from leanmim.checkpoint import load, save\n"
        "path = Path(sys.argv[1]); state = load(path)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); save(path, state)"
    )
    found = subprocess.run([sys.executable, "-c", code, last], capture_output=True, text=True)
    assert found.stderr.splitlines()[-1].startswith("leanmim.errors.CannotWrite: "), found.stderr
    assert "ulimit -f" in found.stderr
    assert last.read_bytes() == before and [file.name for file in last.parent.iterdir()] == ["last.pt"]
