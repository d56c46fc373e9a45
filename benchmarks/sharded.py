"""Several processes over gloo, each with the model (DDP) or a share of it (--shard, FSDP2), against one with the same total threads.

    python benchmarks/sharded.py

The processes of all variants wait side by side, and the variants take their steps in turns, so that a busy machine slows all
alike. All see the same images with the same masks, so their losses must agree. Then a run in 2 and in 4 processes, sharded,
loses one to SIGKILL and is continued by the same command; its losses must be those of a run that nobody disturbed.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist

from leanmim.config import Pretrain
from leanmim.factory import build
from leanmim.masking import random_mask
from leanmim.mim import MIM
from leanmim.placement import place
from leanmim.processes import Process, processes
from leanmim.recipes import BIM, MAE
from leanmim.step import make_optimizers, update

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import process_faults
from tests.helpers import PHOTOS
from tests.process_faults import Fault, together

IMAGES = 16  # of a step, over all processes
WORLDS = (1, 2, 4)


class Variant:
    """A recipe in one of several processes, as a whole or shared out."""

    def __init__(self, config: Pretrain, process: Process) -> None:
        torch.manual_seed(0)
        model = build(config)
        self.config, self.process, self.taken = config, process, 0
        self.optimizers = make_optimizers(model, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-4
        self.model: MIM = model
        self.placement = place(model, self.optimizers, config, torch.device("cpu"), process)
        model.draw_mask = self.own_mask  # type: ignore[method-assign]

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's share of the rows."""
        return rows.chunk(self.process.world)[self.process.rank]

    def own_mask(self, images: torch.Tensor) -> Any:
        """The masks that these images have in every variant."""
        noise = torch.rand(IMAGES, self.model.encoder.grid.n, generator=torch.Generator().manual_seed(self.taken))
        return random_mask(self.mine(noise), self.model.encoder.grid, self.model.mask_ratios[0], self.model.mask_unit)

    def step(self) -> tuple[float, float]:
        """Seconds, and the mean loss."""
        images = torch.randn(IMAGES, 3, *self.config.size, generator=torch.Generator().manual_seed(self.taken))
        before = time.perf_counter()
        losses = update(self.placement.losses, self.optimizers, [self.mine(images)])
        seconds = time.perf_counter() - before
        self.taken += 1
        return seconds, self.process.mean(losses).mean().item()


def worker(rank: int, world: int, port: int, configs: list[Pretrain], orders: Connection) -> None:
    """One of ``world`` processes: takes a step of a variant, with so many threads, whenever it is told to."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    with processes("cpu", 10.0) as (process, _):
        variants = [Variant(config, process) for config in configs]
        while (order := orders.recv()) is not None:
            number, threads = order
            torch.set_num_threads(threads)
            orders.send(variants[number].step())


def throughput(recipes: dict[str, Pretrain], rounds: int) -> list[dict[str, Any]]:
    """Seconds and losses of every round: one process, then DDP, then sharded, for each recipe and number of threads."""
    configs: dict[int, list[Pretrain]] = {world: [] for world in WORLDS}
    found = []
    for name, config in recipes.items():
        for total in WORLDS[1:]:
            for world, shard in ((1, False), (total, False), (total, True)):
                order = (len(configs[world]), total // world)
                configs[world].append(replace(config, shard=shard))
                found.append({"recipe": name, "processes": world, "threads": total // world, "shard": shard, "order": order,
                              "seconds": [], "losses": []})  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["leanmim.placement"])
    stores = {world: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for world in WORLDS}
    teams: dict[int, list[Connection]] = {world: [] for world in WORLDS}
    for world in WORLDS:
        for rank in range(world):
            here, there = context.Pipe()
            own = (rank, world, stores[world].port, configs[world], there)
            context.Process(target=worker, args=own, daemon=True).start()
            teams[world].append(here)
    for _ in range(rounds + 1):  # the first one warms up
        for one in found:
            for orders in teams[one["processes"]]:
                orders.send(one["order"])
            steps = [orders.recv() for orders in teams[one["processes"]]]
            one["seconds"].append(max(seconds for seconds, _ in steps))
            one["losses"].append(steps[0][1])
    for orders in (orders for team in teams.values() for orders in team):
        orders.send(None)
    return found


def compared(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each against one process with the same total threads."""
    rows = []
    for start in range(0, len(found), 3):
        alone, *several = found[start : start + 3]
        for own in several:
            ratios = [a / b for a, b in zip(alone["seconds"][1:], own["seconds"][1:], strict=True)]
            off = max(abs(a - b) / a for a, b in zip(alone["losses"], own["losses"], strict=True))
            rows.append({
                "recipe": own["recipe"], "processes x threads": f"{own['processes']} x {own['threads']}",
                "placement": "--shard" if own["shard"] else "DDP",
                "step, ms": f"{1e3 * statistics.median(own['seconds'][1:]):.0f}",
                "one process, ms": f"{1e3 * statistics.median(alone['seconds'][1:]):.0f}",
                "speed": f"{statistics.median(ratios):.2f}", "lowest to highest": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "losses off by": f"{off:.0e}",
            })  # fmt: skip
    return rows


def killed_and_continued(world: int) -> float:
    """The largest relative difference between the losses of a sharded run that lost a process, and of one that did not."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = f"{process_faults.MAE} --shard --data {PHOTOS} --epochs 4 --batch-size {8 // world} --show-every 0"
        ends = []
        for name, faults in (("whole", []), ("killed", [Fault("killed", world - 1)])):
            words = f"{command} --out {folder / name}".split()
            done = together(folder, words, world, faults)
            assert all(code == 0 for code in done.codes) != bool(faults), done.texts
            if faults:
                assert together(folder, words, world).codes == [0] * world
            log = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
            ends.append([line["loss"] for line in log])
    return max(abs(a - b) / a for a, b in zip(*ends, strict=True))


def main() -> None:
    """Measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    given = parser.parse_args()
    own: dict[str, Any] = dict(model=given.model, input_size=(96,), precision="fp32", data="-", out="-")
    recipes = {"mae": replace(MAE, **own), "bim": replace(BIM, **own)}
    found = throughput(recipes, given.rounds)
    resumed = {str(world): killed_and_continued(world) for world in WORLDS[1:]}
    record.write(
        "sharded-cpu", "Several processes over gloo against one with the same total threads",
        {"model": given.model, "input": "96 px", "images a step": IMAGES, "precision": "fp32", "rounds": given.rounds},
        compared(found), {"steps": found, "killed and continued": resumed},
        "Speed: one process over several in the same round, medians over rounds; the machine has two cores, and other programs ran. "
        "Losses: the largest relative difference over all steps, same images and masks. Of sharded runs of which one process was "
        "killed and which the same command continued, losses differ from an undisturbed run's by "
        + ", ".join(f"{off:.0e} ({world} processes)" for world, off in resumed.items()) + ".",
    )  # fmt: skip


if __name__ == "__main__":
    main()
