"""No command but `publish` opens a connection, unless it is told to (--track, URLs), or writes outside its output, the cache folder and the system's folder for temporary files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from leanmim.config import Pretrain
from tests.runs import ENVIRONMENT, arguments, labelled

INDUCTOR = default_cache_dir()  # torch makes it when it is imported
WATCHED = """
import json, os, socket, sys
from pathlib import Path

seen = []

def hook(event, values):
    if event == "socket.connect" and values[0].family == socket.AF_UNIX:
        return  # within the machine: readers
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        seen.append([event, repr(values)])
    writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and isinstance(values[0], (str, bytes)):
        seen.append(["write", os.path.abspath(os.fsdecode(values[0]))])
    if event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        seen.append(["write", os.path.abspath(os.fsdecode(values[0 if event == "os.mkdir" else 1]))])

sys.addaudithook(hook)
from leanmim.cli import main
for line in json.loads(sys.argv[1]):
    main(line)
Path(sys.argv[2]).write_text(json.dumps(seen))
"""


def test_no_connection_and_no_write_elsewhere(tiny: Pretrain, tmp_path: Path) -> None:
    run, home, temporary, report = (tmp_path / name for name in ("run", "home", "temporary", "seen.json"))
    home.mkdir()
    temporary.mkdir()
    data = str(labelled(tmp_path / "labelled"))
    out = str(tmp_path / "out")
    common = ["--device", "cpu", "--workers", "0"]
    command_lines = [
        arguments(replace(tiny, out=str(run), workers=2)),
        ["knn", str(run), "--data", data, *common],
        ["export", str(run), "--format", "transformers", "--out", f"{out}/export"],
        ["embed", str(run), "--data", data, "--out", f"{out}/features.npy", *common],
        ["finetune", str(run), "--data", data, "--out", f"{out}/tuned", "--epochs", "1", "--batch-size", "2", *common],
        ["predict", f"{out}/tuned", data, "--out", f"{out}/predictions.csv", *common],
        ["report", str(run), f"{out}/tuned", "--out", f"{out}/report.html"],
    ]
    environment = ENVIRONMENT | {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "MPLCONFIGDIR": str(home / ".cache" / "matplotlib"),
    }
    subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(command_lines), str(report)],
        check=True, env=environment, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    seen = json.loads(report.read_text())
    assert not [what for what in seen if what[0] != "write"]
    allowed = tuple(f"{folder}{os.sep}" for folder in (run, out, home / ".cache", temporary, "/dev", INDUCTOR))
    written = {place for what, place in seen if what == "write"}
    assert any(place.startswith(str(run)) for place in written)
    mine = {place for place in written if not f"{place}{os.sep}".startswith(allowed) and "__pycache__" not in place}
    assert mine - {str(report), "/proc/self/clear_refs"} == set()  # the latter is a switch of the system
