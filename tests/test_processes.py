"""Several processes train as one."""

import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import leanmim
from leanmim.config import Pretrain
from leanmim.data import IMAGENET, Crops, Folder, Normalise, collate, epoch_order, seed_of
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.processes import Peers, Process, enough_memory, of_distributed, processes
from leanmim.schedule import learning_rate
from leanmim.step import parameter_groups
from tests.forks import finish
from tests.process_faults import SCENARIOS, attempt, together
from tests.runs import ENVIRONMENT, arguments, lines, weights

CPU = torch.device("cpu")


@pytest.mark.parametrize(("accum", "segments"), [(1, 1), (2, 1), (2, 2)])
def test_two_processes_average_their_gradients(tiny: Pretrain, tmp_path: Path, accum: int, segments: int) -> None:
    """Two gloo processes of batch 4 take the step that averages both processes' gradients, end to end or block-wise."""
    config = replace(tiny, epochs=1, accum=accum, blr=0.1, warmup_epochs=0.0, segments=segments)
    done = together(tmp_path, arguments(config))
    assert done.codes == [0, 0], done.texts
    assert f"effective batch {8 * accum} = 4 x accum {accum} x 2 processes" in done.texts[0]

    torch.manual_seed(0)
    model = build(config).train()
    groups = [group for of_segment in parameter_groups(model) for group in of_segment]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    data = Crops(Folder(config.data, 3), (32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, seed=0)
    normalise = Normalise(*IMAGENET[3], torch.device("cpu"))
    order, steps = epoch_order(16, 0, 0), 2 // accum
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 0.0, 0.1 * 8 * accum / 256)
        optimizer.zero_grad()
        for micro in range(accum):
            for rank in range(2):
                first = ((accum * step + micro) * 2 + rank) * 4
                images, _ = collate([data[0, index] for index in order[first : first + 4].tolist()])
                torch.manual_seed(seed_of(0, rank, step, micro))
                for loss in model.losses(normalise(images)):
                    (loss / accum / 2).backward()
        optimizer.step()
    for name, value in weights(config).items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-4, atol=2e-6), name

    # one process goes on with it: evaluates, exports, starts from it
    backbone, _, _ = leanmim.load_backbone(config.out)
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    assert f"finished after step {steps}" in finish(arguments(config), tmp_path / "alone.txt")


def peers(rank: int, store: dist.Store, minutes: float = 1e-3) -> Peers:
    return Peers(Process(rank, 2), store, minutes)


def test_who_waits_goes_on_when_all_are_there_however_late() -> None:
    store = dist.HashStore()
    first, second = peers(0, store, 60.0), peers(1, store, 60.0)
    order: list[str] = []

    def late() -> None:
        time.sleep(0.2)
        order.append("here")
        second.meet()

    for _ in range(2):
        thread = threading.Thread(target=late)
        thread.start()
        first.meet()
        order.append("met")
        thread.join()
    assert order == ["here", "met"] * 2
    for each in (first, second):
        each.rest()


def test_a_silent_process_is_named() -> None:
    """Before it has begun to count as well."""
    alone = peers(0, dist.HashStore())
    with pytest.raises(
        UserError, match=r"rank 1 of 2 processes has not answered for 0\.001 minutes .*same command continues"
    ):
        alone.meet()
    assert "rank 1 of 2 processes" in alone.cause()
    alone.rest()


def test_what_a_process_told_at_its_end_is_passed_on() -> None:
    store = dist.HashStore()
    first, second = peers(0, store, 60.0), peers(1, store, 60.0)
    assert "all of them answer; if one is that much slower" in replace_pause(first).cause()
    second.tell("the disk is full")
    with pytest.raises(UserError, match="rank 1 of 2 processes has ended: the disk is full"):
        first.meet()
    assert first.cause() == "rank 1 of 2 processes has ended: the disk is full"
    for each in (first, second):
        each.rest()


def replace_pause(peers: Peers) -> Peers:
    """With less patience."""
    peers.pause = 0.01
    return peers


def test_errors_of_memory_and_of_others() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")):
        with pytest.raises(UserError, match=r"out of memory on cpu .*same command continues"), enough_memory(CPU):
            raise error
    for other in (RuntimeError("shapes"), RecursionError("out of memory"), UserError("no")):
        with pytest.raises(type(other)), enough_memory(CPU):
            raise other
    with pytest.raises(UserError, match="out of memory on cpu"), processes("cpu", 1.0):
        torch.empty(2**60)
    assert of_distributed(dist.DistBackendError("no"))
    assert of_distributed(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not of_distributed(RuntimeError("shapes"))


def test_others_that_cannot_be_met_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that some launchers set, and nobody at the address."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"rank 1 of 2 .*MASTER_ADDR expected.*unset WORLD_SIZE"), processes("cpu", 1.0):
        pass
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("leanmim.processes.START", timedelta(seconds=1))
    with pytest.raises(UserError, match=rf"cannot meet the others at 127\.0\.0\.1:{port} "), processes("cpu", 1.0):
        pass


@pytest.mark.parametrize(
    "name",
    ["rank 0 stopped while it evaluates", "block-wise, rank 1 killed", "fine-tuning, rank 1 killed"],
)
def test_a_fault_of_one_process_ends_the_others_with_a_message(name: str, tmp_path: Path) -> None:
    (scenario,) = [scenario for scenario in SCENARIOS if scenario.name == name]
    assert attempt(scenario, tmp_path) == ""


def test_torchrun_starts_again_from_the_last_checkpoint(tiny: Pretrain, tmp_path: Path) -> None:
    """Also with --overwrite in the command, and where the processes share out the model; the losses are those of a run that nobody
    disturbed.
    """
    config = replace(tiny, checkpoint_minutes=0.0, overwrite=True, shard=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.process_faults", str(tmp_path / "killed"), *arguments(config)],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing after step 2" in done.stdout
    undisturbed = replace(config, out=str(tmp_path / "undisturbed"), shard=False)
    assert together(tmp_path, arguments(undisturbed)).codes == [0, 0]
    (found, expected) = ([(line["step"], line["loss"]) for line in lines(own)] for own in (config, undisturbed))
    assert found == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in expected]
