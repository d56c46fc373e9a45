"""Mutated photos, by the thousand, through the reader: each is a picture or has a reason, nothing crashes, hangs or grows.

    python benchmarks/fuzz.py --count 5000 --seed 0

They are read in a process of their own with a limit on its memory, watched from here.
"""

import argparse
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.corpus import fuzz, outcome

MEMORY = 4 * 2**30  # bytes that reading may take beside the libraries
PATIENCE = 300.0  # s for one file; the reader itself gives up after 30 s of computing


def read_all(start: int, count: int, seed: int) -> None:
    """Print an outcome for each file from ``start`` on."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    print("ready", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photo.jpg")
        for data in islice(fuzz(count, seed), start, None):
            path.write_bytes(data)
            print(outcome(path), flush=True)


def outcomes(start: int, count: int, seed: int) -> Iterator[str]:
    """Of the files from ``start`` on, up to one that ends or stops the process that reads them."""
    command = [sys.executable, __file__, "--count", str(count), "--seed", str(seed), "--from", str(start)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as child:
        assert child.stdout is not None
        read, left = 0, child.stdout.readline()[:0]  # it is ready: the libraries are loaded
        while start + read < count:
            if not select.select([child.stdout], [], [], PATIENCE)[0]:
                child.kill()
                yield "hang"
                return
            if not (new := os.read(child.stdout.fileno(), 2**16)):
                yield f"crash: the process ended with {child.wait()}"
                return
            *lines, left = (left + new).split(b"\n")
            yield from (line.decode() for line in lines)
            read += len(lines)


def survey(count: int, seed: int = 0) -> Counter[str]:
    """How many files were tried, readable, bad, and what was a crash or a hang."""
    found = Counter[str]()
    while found["tried"] < count:
        for what in outcomes(found["tried"], count, seed):
            number = found["tried"]
            found.update(["tried", what.partition(":")[0]])
            if what not in ("readable", "bad"):
                print(f"file {number} of seed {seed}: {what}", file=sys.stderr)
    return found


def main() -> None:
    """Read the arguments, survey, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="files (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--from", type=int, dest="start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start is not None:
        read_all(arguments.start, arguments.count, arguments.seed)
        return
    before = time.monotonic()
    found = survey(arguments.count, arguments.seed)
    table = ", ".join(f"{name} {found[name]}" for name in ("tried", "readable", "bad", "crash", "hang"))
    print(f"{table}; {time.monotonic() - before:.0f} s")
    sys.exit(bool(found["crash"] + found["hang"]))


if __name__ == "__main__":
    main()
