"""The time of a step with one segment on the device, by arithmetic: no GPU is needed.

    python benchmarks/offload_timeline.py

Segments of equal size; FLOPs and parameters as counted in results/bim-cost.json. *One by one*: as offloading was before, where
copies had one stream, the host waited for the copy of the segment before, and each batch copied all segments anew, gradients
too. *Both ways*: as `leanmim.offload` does it.
"""

import argparse
import json

import record

FORWARD = 1 / 3  # of the time of a segment
STATE, GRADIENT = 12, 4  # bytes of a parameter: weight and two moments; gradient
PIECE = 2**25  # bytes that are copied at once


def one_by_one(work: float, copy: float, segments: int, steps: int) -> float:
    """Seconds when all steps are done.

    Args:
        work: of a segment, s.
        copy: of a segment in one direction, s.
        segments: of the model.
        steps: forward and backward passes.
    """
    done = lane = arrived = 0.0
    for _ in range(segments * steps):
        begin = max(done, arrived)
        left = max(done, lane) + copy  # the segment before, to the host
        arrived = lane = left + copy  # the next segment, to the device
        done = max(begin + FORWARD * work, left) + (1 - FORWARD) * work
    return done


def both_ways(work: float, copy: float, piece: float, segments: int, steps: int) -> float:
    """The same for copies in both directions at once; ``piece`` seconds are the lead of one before the other."""
    done = outward = inward = weights = state = 0.0
    for _ in range(segments * steps):
        begin = max(done, weights)
        outward = max(done, outward)
        start = max(outward + piece, inward)
        outward, inward = outward + copy, max(start + copy, outward + copy + piece)
        done = max(begin + work, state)
        weights, state = start + copy / 3, inward
    return done


def per_step(timeline, *arguments: float, segments: int) -> float:
    """Seconds of a step once they are all alike."""
    return (timeline(*arguments, segments, 12) - timeline(*arguments, segments, 4)) / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=200.0, help="of the GPU in real steps, 10^12 a second")
    parser.add_argument("--pcie", type=float, default=25.0, help="10^9 bytes a second in each direction")
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    arguments = parser.parse_args()
    counted = json.loads((record.RESULTS / "bim-cost.json").read_text())
    rows = []
    for line, cost in zip(counted["table"], counted["raw"], strict=True):
        name, _, rest = line["recipe"].removeprefix("bim, ").partition(" ")
        if rest != "segments" or name not in ("4", "8"):
            continue
        segments = int(name)
        work = cost["train_flops_per_image"] * arguments.batch / (1e12 * arguments.tflops) / segments
        parameters = (cost["encoder_parameters"] + cost["decoder_parameters"]) / segments
        copy, piece = (size / (1e9 * arguments.pcie) for size in (STATE * parameters, PIECE))
        resident = work * segments
        row = {"model": line["model"], "segments": segments, "resident, ms": f"{1e3 * resident:.0f}"}
        for accum in (1, 4):
            # each batch's gradients are there but in the first one; they go both ways
            old_copy = copy * (1 + (accum > 1) * GRADIENT / STATE)
            old = accum * per_step(one_by_one, work / accum, old_copy, segments=segments)
            new = per_step(both_ways, work, copy, piece, segments=segments)
            row |= {
                f"one by one, accum {accum}": f"{old / resident:.2f}",
                f"both ways, accum {accum}": f"{new / resident:.2f}",
            }
        rows.append(row)
    configuration = {"TFLOP/s": arguments.tflops, "PCIe, GB/s": arguments.pcie, "batch": arguments.batch}
    record.write("offload-timeline", "A step with one segment on the device, by arithmetic", configuration, rows, rows,
                 "Ratios to the step with all segments on the device. Nothing here is measured.")  # fmt: skip


if __name__ == "__main__":
    main()
