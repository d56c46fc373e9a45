"""Accuracy against depth."""

import json
from pathlib import Path

from leanmim.config import Report
from leanmim.page import report
from leanmim.run import Run
from tests.helpers import fake_run, in_segments


def test_curves_of_the_report_do_not_mix_data_sets(tmp_path: Path) -> None:
    run = Run(Path(fake_run(in_segments(segments=2, mask_ratio=0.5), tmp_path / "run").out))
    lines = [
        {"what": "knn", "name": "pretrained", "value": value, "data": data, "options": {"depth": depth, "k": 20},
         "depth": depth, "parameters": depth, "latency_ms": 1.0}
        for data, depth, value in (("a", 2, 0.1), ("b", 4, 0.9))
    ]  # fmt: skip
    run.evaluations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Accuracy against depth" not in report(Report(runs=(str(run.folder),))).read_text()
    lines += [{**lines[0], "depth": 4, "value": 0.2}, {**lines[1], "depth": 2, "value": 0.8}]
    run.evaluations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(Report(runs=(str(run.folder),))).read_text()
    assert all(f", {data}, k 20" in page for data in "ab")
