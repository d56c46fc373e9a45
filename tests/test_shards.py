"""Folders of shares: which stay, and what is read of them. How they are written is tested with whole runs, in test_sharded."""

import io
import os
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import StorageMeta

from leanmim.shards import Known, named, put_back, sweep, unused


def test_what_is_taken_out_goes_back_to_its_place() -> None:
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}
    state: dict[str, Any] = {
        "model": {"a.b.weight": torch.zeros(2)},
        "optimizers": [{"state": {0: {}}}, {"state": {4: moments}}],
    }
    taken = {name: held[key] for name, held, key in named(state)}
    assert taken.keys() == {"model.a.b.weight", "optimizers.1.4.step", "optimizers.1.4.exp_avg"}
    empty: dict[str, Any] = {"model": {}, "optimizers": [{"state": {0: {}}}, {"state": {}}]}
    put_back(empty, taken)
    assert empty == state


def test_a_folder_stays_while_a_checkpoint_names_it(tmp_path: Path) -> None:
    """Of a damaged one nobody knows which it names: then all stay."""
    for name in ("step-1.shards", "step-2.shards", "step-2-1.shards"):
        (tmp_path / name).mkdir()
    assert unused(tmp_path, 2) == "step-2-2.shards" and unused(tmp_path, 3) == "step-3.shards"
    torch.save({"shards": {"folder": "step-2-1.shards"}}, tmp_path / "last.pt")
    torch.save({"model": {}}, tmp_path / "last-1.pt")
    (tmp_path / "last-2.pt").write_text("no checkpoint")
    sweep(tmp_path, [tmp_path / "last.pt", tmp_path / "last-2.pt"])
    assert len(list(tmp_path.glob("*.shards"))) == 3
    sweep(tmp_path, [tmp_path / "last.pt", tmp_path / "last-1.pt"])
    assert [path.name for path in tmp_path.glob("*.shards")] == ["step-2-1.shards"]


@pytest.mark.parametrize("value", [os.getcwd, io.BytesIO, torch.load])
def test_nothing_is_unpickled_that_could_run(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="does not belong into a checkpoint"):
        Known(io.BytesIO(pickle.dumps(value))).load()


def test_descriptions_are_unpickled() -> None:
    described = [StorageMeta(checkpoint_id=Path("there")), torch.Size([2]), torch.float32]
    found = Known(io.BytesIO(pickle.dumps(described))).load()
    assert found == [StorageMeta(checkpoint_id=PurePosixPath("there")), *described[1:]]
