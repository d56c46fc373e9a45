"""Segments in several processes (--pipeline) against one process: measured over gloo on a CPU, predicted for GPUs.

    GOMP_SPINCOUNT=1000 python benchmarks/block_parallel.py

Measured: two and four processes of one thread each as a pipeline, and one of as many threads, in turns; each turn fills and drains the
pipeline. Then runs of 2 and of 4 processes lose one to SIGKILL and are continued by the same command; their losses must be those of one process.
Predicted: from counted FLOPs of the segments and bytes of a message, for a share of the card's peak and links that are assumed.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import record
import torch
from steps import ready
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leanmim.caches import empty_caches
from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.data import IMAGENET, Normalise
from leanmim.encoders.backbone import backbone_of
from leanmim.factory import build
from leanmim.mim import Part
from leanmim.pipeline import Pipeline, balanced, speed_up
from leanmim.placement import place
from leanmim.processes import InPipeline, processes
from leanmim.recipes import BIM, published
from leanmim.step import make_optimizers, update

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import process_faults
from tests.helpers import PHOTOS
from tests.process_faults import Fault, together

MODELS = {"vit_base_patch16_224": 4, "vit_large_patch16_224": 8, "vit_huge_patch14_224": 8}  # segments
CARD = ("H100", 0.4 * 989e12)  # FLOP/s in bf16: a share of the peak
LINKS = {"NVLink 4": 450e9, "PCIe 4 x16": 32e9, "100 GbE": 12.5e9, "10 GbE": 1.25e9}  # bytes/s in one direction
USED = 0.7  # of a link's bytes/s


def message_bytes(config: Pretrain) -> list[int]:
    """Of an image, at the end of each segment but the last: the image in bytes, and the features."""
    found: list[int] = []
    features: list[Tensor] = []

    def leave(x: Tensor) -> None:
        features[:] = [x]
        found.append(x.nbytes + config.channels * config.size[0] * config.size[1])

    backbone = backbone_of(config, config.depth, device="meta")
    with empty_caches(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = build(config, backbone.to_empty(device="cpu"))
        model.autocast = torch.bfloat16 if config.precision == "bf16" else None
        images = torch.empty(1, config.channels, *config.size)
        for i in range(len(model.decoders)):
            for _ in model.losses(
                images, part=Part(range(i, i + 1), lambda images: features[0] if features else images, leave)
            ):
                pass
    return found[:-1]


def predicted(batch: int) -> None:
    """Times as fast as one GPU."""
    rows, raw = [], []
    for model, segments in MODELS.items():
        config = replace(
            published(BIM), model=model, segments=segments, mask_ratio=0.75, batch_size=batch, precision="bf16"
        )
        cost, _ = count(config, "cuda")
        message = batch * max(message_bytes(config))
        gradients = 4 * (cost.encoder_parameters + cost.decoder_parameters)
        for world in (2, 4, 8):
            if world > segments:
                continue
            part = max(sum(cost.segment_flops[i] for i in own) for own in balanced(cost.segment_flops, world))
            whole, tick = (batch * flops / CARD[1] for flops in (sum(cost.segment_flops), part))
            sent = {link: message / (USED * speed) for link, speed in LINKS.items()}
            rows.append({
                "model": model.removesuffix("_224"), "segments": segments, "processes": world,
                "balance": f"{speed_up(cost.segment_flops, world):.2f}", "a step of the slowest, ms": f"{1e3 * tick:.0f}",
                "message, MB": f"{message / 1e6:.0f}", "gradients of data parallelism, MB": f"{2 * (world - 1) / world * gradients / 1e6:.0f}",
                **{link: f"{whole / max(tick, seconds):.2f}" for link, seconds in sent.items()},
            })  # fmt: skip
            raw.append({**rows[-1], "segment_flops": cost.segment_flops, "message_bytes": message})
            print(rows[-1], flush=True)
    configuration = {
        "batch": batch, "input": "224 px", "precision": "bf16", "card": f"{CARD[0]} at {CARD[1] / 1e12:.0f} TFLOP/s, assumed",
        "of a link's bytes/s": f"{USED:.0%}, assumed",
    }  # fmt: skip
    record.write("block-parallel-predicted", "A pipeline of segments on GPUs, predicted, not measured", configuration, rows, raw,
                 "Times as fast as one GPU in a long run: all FLOPs by those of the most expensive part, or the message's time where that is "
                 "longer. A message is sent while the sender goes backward, and there is one for each border between processes; of "
                 "data parallelism what a ring all-reduce of fp32 gradients sends from each process in a step.")  # fmt: skip


def rounds(rank: int, world: int, port: int, config: Pretrain, turns: int, steps: int, results: Any) -> None:
    """In one of several processes: the seconds of so many steps, alone with as many threads, and in a pipeline with one each, in
    turns.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cpu")
    torch.set_num_threads(1)
    costs = count(config)[0].segment_flops
    with processes("cpu", 10.0) as (process, _):
        process = InPipeline(*process)
        model = build(config)
        optimizers = make_optimizers(model, config)
        pipeline = place(model, optimizers, config, device, process, balanced(costs, world))
        assert isinstance(pipeline, Pipeline)
        alone, of_alone = ready(config, device)
        images = torch.randint(0, 255, (int(config.batch_size), config.channels, *config.size), dtype=torch.uint8)
        normalise = Normalise(*IMAGENET[config.channels], device)

        def share(step: int) -> Tensor:
            own = optimizers[pipeline.own.start : pipeline.own.stop]
            return update(pipeline.losses, own, map(normalise, pipeline.batches(repeat(images))), 1, 0.0, [step], False)

        done = 0
        for turn in range(turns + 1):  # the first one warms up
            process.wait()
            before = time.perf_counter()
            for step in range(done, done + steps):
                pipeline.step(step, lambda now, stop=done + steps: now == stop, share)
            together, done = time.perf_counter() - before, done + steps
            process.wait()
            if process.first:
                torch.set_num_threads(world)
                before = time.perf_counter()
                for step in range(steps):
                    update(alone.losses, of_alone, [normalise(images)], 1, 0.0, [step], False)
                if turn:
                    results.put((time.perf_counter() - before, together))
                torch.set_num_threads(1)
        if process.first:
            results.put((sum(layout.empty(device).nbytes for layout in pipeline.outgoing), costs))


def killed_and_continued(worlds: list[int]) -> list[float]:
    """For so many processes, of which one is killed and which the same command continues: the largest relative difference between
    their losses and those of one process.
    """
    with tempfile.TemporaryDirectory() as place:
        folder, off = Path(place), []
        command = f"{process_faults.BIM} --segments 4 --data {PHOTOS} --epochs 4 --batch-size 4 --show-every 0"
        losses = []
        for world in (1, *worlds):
            out = folder / str(world)
            words = f"{command} --out {out} {'--pipeline' if world > 1 else ''}".split()
            if world > 1:  # at the first process's third step
                assert all(together(folder, words, world, [Fault("killed", 0, 3)]).codes)
            done = together(folder, words, world)
            assert done.codes == [0] * world, done.texts
            log = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            losses.append([line["loss"] for line in log])
            off.append(max(abs(a - b) / a for a, b in zip(losses[0], losses[-1], strict=True)))
    return off[1:]


def measured(config: Pretrain, worlds: list[int], turns: int, steps: int) -> None:
    """Processes with a thread each against one with as many."""
    rows, raw = [], []
    for world in worlds:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")  # nothing was computed here yet
        results = context.Queue()
        together = [
            context.Process(target=rounds, args=(rank, world, port, config, turns, steps, results))
            for rank in range(world)
        ]
        for one in together:
            one.start()
        times = [results.get(timeout=1800) for _ in range(turns)]
        message, costs = results.get()
        for one in together:
            one.join()
        images = int(config.batch_size) * steps
        filled = (
            speed_up(costs, world) * steps / (steps + world - 1)
        )  # of a turn: not all are busy in the first steps and the last
        ratios = [alone / piped for alone, piped in times]
        rows.append({
            "processes": world, "model": config.model.removesuffix("_224"), "batch": config.batch_size,
            "one process of as many threads, images/s": f"{statistics.median(images / alone for alone, _ in times):.2f}",
            "a pipeline of processes of 1 thread, images/s": f"{statistics.median(images / piped for _, piped in times):.2f}",
            "ratio": f"{statistics.median(ratios):.2f}", "ratios of the rounds": ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios)),
            "allowed by balance, filling and draining": f"{filled / world:.2f} of {world} times", "message, MB": f"{message / 1e6:.2f}",
        })  # fmt: skip
        raw.append({"processes": world, "seconds": times, "message_bytes": message, "segment_flops": costs})
        print(rows[-1], flush=True)
    off = ", ".join(
        f"{one:.0e} ({world} processes)" for world, one in zip(worlds, killed_and_continued(worlds), strict=True)
    )
    configuration = {
        "recipe": "bim", "segments": config.segments, "input": f"{config.size[0]} px", "rounds": turns, "steps of a round": steps,
        "precision": "fp32", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set"), "other programs": f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores",
    }  # fmt: skip
    record.write("block-parallel-cpu", "A pipeline of processes against one process, the same threads in all, measured", configuration,
                 rows, raw,
                 "In turns, medians over rounds; each round fills and drains the pipeline. Where there are more processes than cores, "
                 "neither side has a core for each thread. Other programs used the cores meanwhile. Of runs of which one process was killed and "
                 f"which the same command continued, losses differ from those of one process by {off}, relatively.")  # fmt: skip


def main() -> None:
    """Both, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["measured", "predicted"])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="of what is measured")
    parser.add_argument("--input-size", type=int, default=128, help="of what is measured")
    parser.add_argument("--batch-size", type=int, default=16, help="of what is measured")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    arguments = parser.parse_args()
    if "measured" in arguments.parts:
        size, batch = arguments.input_size, arguments.batch_size
        config = replace(BIM, model=arguments.model, input_size=(size,), batch_size=batch, precision="fp32")
        measured(config, arguments.worlds, arguments.rounds, arguments.steps)
    if "predicted" in arguments.parts:
        predicted(256)


if __name__ == "__main__":
    main()
