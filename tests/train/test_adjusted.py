"""Learning rate, clipping and precision may be changed when a run is continued before its end; it is said and written down."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.run import Run
from leanmim.train.pretrain import pretrain
from tests.runs import arguments, lines, pretrain_until


def test_what_helps_against_divergence_may_change_before_the_end(
    tiny: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain_until(tiny, 3)
    changed = replace(tiny, blr=1e-5, clip_grad=0.5)
    main(arguments(changed))
    assert "from step 3 on: --blr 1e-05 instead of 0.00015, --clip-grad 0.5 instead of 0" in capsys.readouterr().out
    assert [json.loads(line) for line in Run(Path(tiny.out)).changes.read_text().splitlines()] == [
        {"step": 3, "option": "--blr", "before": 1.5e-4, "now": 1e-5},
        {"step": 3, "option": "--clip-grad", "before": 0.0, "now": 0.5},
    ]
    rates = {line["step"]: line["lr"] for line in lines(tiny)}
    assert rates[4] < rates[3] / 5
    assert len(rates) == 8

    main(arguments(changed))  # the same again: a finished run, nothing is changed
    assert "instead of" not in capsys.readouterr().out
    with pytest.raises(
        UserError, match=re.escape("finished run of another configuration:\n  --blr: 1e-05 there, 0.00015 now")
    ):
        pretrain(tiny)


def test_a_learning_rate_may_take_the_place_of_the_one_that_was_chosen(
    tiny: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain_until(replace(tiny, blr="auto"), 2)
    pretrain(replace(tiny, blr="auto", lr=1e-6))
    out = capsys.readouterr().out
    assert "as this run began" not in out
    assert re.search(r"from step 2 on: --blr 6.4e-05 instead of \d", out)
    assert lines(tiny)[4]["lr"] < 1e-6


def test_nothing_else_may_change(tiny: Pretrain) -> None:
    pretrain_until(tiny, 2)
    with pytest.raises(UserError, match=r"another configuration:\n  weight_decay: 0.05 there, 0.1 now"):
        pretrain(replace(tiny, blr=1e-5, weight_decay=0.1))
    assert not Run(Path(tiny.out)).changes.exists()
