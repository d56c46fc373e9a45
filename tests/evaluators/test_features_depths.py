"""What is written about an evaluated depth."""

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from leanmim.config import Knn
from leanmim.evaluators.features import latency
from leanmim.evaluators.knn import knn
from leanmim.run import Run
from tests.helpers import fake_run, in_segments, three_classes


def test_latency_is_the_median_of_what_each_image_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = accumulate([0.0, 9.0, 1.0, 2.0, 1.0, 4.0, 1.0, 8.0])  # s between readings; the first image warms up
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert latency(lambda image: image, torch.zeros(1, 3, 4, 4), repeats=3) == 4.0


def test_the_depth_of_a_run_of_the_first_stages_is_recorded(tmp_path: Path) -> None:
    labelled = three_classes(tmp_path / "labelled")
    config = fake_run(in_segments("convnext", "pixel", depth=3, segments=3, mask_ratio=0.5), tmp_path / "run")
    for depth in (2, None):
        list(knn(Knn(run=config.out, data=labelled, device="cpu", workers=0, depth=depth)))
    written = Run(Path(config.out)).evaluations.read_text().splitlines()
    assert [json.loads(line)["depth"] for line in written] == [2, 3]
