"""What follows from the numbers of a comparison."""

from dataclasses import replace
from typing import Any

import pytest

from leanmim.comparison.cells import Kind
from leanmim.comparison.table import Row, Score, Table, markdown, promising, score_of


def score(value: float, spread: float = 0.01, seeds: int = 3) -> Score:
    """Of three seeds their standard deviation is the spread."""
    return Score(value, value - spread, value + spread, (value - spread, value, value + spread)[-seeds:], 500)


def row(name: str, value: float, kind: Kind = "recipe", spread: float = 0.01, **costs: Any) -> Row:
    own = (
        dict(epochs=8, seconds=600.0, flops=1e12, memory_bytes=2.0**30, measured_bytes=2.0**30, images_per_second=10.0)
        | costs
    )
    return Row(kind, name, 3, {"knn": score(value, spread)}, **own if kind == "recipe" else {})


def table(*rows: Row, **changes: Any) -> Table:
    own: dict[str, Any] = dict(title="t", measures=("knn",), budget="seconds", rows=list(rows), planned=3)
    return Table(**own | changes)


def test_mean_and_spread_of_seeds_and_the_interval_of_one() -> None:
    found = [{"value": value, "interval": [0.1, 0.9], "images": 500} for value in (0.40, 0.44)]
    both = score_of(found)
    assert (both.value, both.low, both.high) == pytest.approx((0.42, 0.42 - 0.02 * 2**0.5, 0.42 + 0.02 * 2**0.5))
    assert str(both) == "42.0 ± 2.8"
    alike = score_of([found[0], found[0]])  # 200 of 500 each: that two seeds agree does not make it exact
    assert (alike.value - alike.low, alike.high - alike.value) == pytest.approx((0.0219, 0.0219), abs=1e-4)
    assert str(alike) == "40.0 ± 0.0"
    one = score_of(found[:1])
    assert (one.value, one.low, one.high) == (0.40, 0.1, 0.9) and str(one) == "40.0 (10.0 to 90.0)"


def test_pretraining_that_does_not_help_is_said_first() -> None:
    baseline = row("random initialisation", 0.41, "untrained")
    found = table(row("mae", 0.40), row("bim", 0.30), baseline)
    assert found.findings()[0] == (
        "Pre-training does not help on these data: kNN 40.0 ± 1.0 % (mae) against 41.0 ± 1.0 % (random initialisation)."
    )
    assert "Pre-training helps" not in str(found)
    found = table(row("mae", 0.425), row("bim", 0.30), baseline)  # above, by less than the spread
    assert found.findings()[0] == (
        "Pre-training is not shown to help on these data, for the difference is within the spread: "
        "kNN 42.5 ± 1.0 % (mae) against 41.0 ± 1.0 % (random initialisation)."
    )


def test_pretraining_that_helps_is_above_the_best_of_all_baselines() -> None:
    baselines = (row("random initialisation", 0.30, "untrained"), row("raw pixels", 0.41, "pixels"))
    found = table(row("mae", 0.44), *baselines).findings()
    assert found[0] == "Pre-training helps: kNN 44.0 ± 1.0 % (mae) against 41.0 ± 1.0 % (raw pixels)."
    assert "is not shown" in table(row("mae", 0.425), *baselines).findings()[0]


def test_pretraining_helps_if_any_recipe_is_above_its_own_untrained_model() -> None:
    baseline = row("random initialisation", 0.40, "untrained")
    found = table(row("mae", 0.50, spread=0.1), row("bim", 0.49), baseline).findings()
    assert found[0] == "Pre-training helps: kNN 49.0 ± 1.0 % (bim) against 40.0 ± 1.0 % (random initialisation)."
    models = [
        replace(row("mae", 0.50), architecture="large"), replace(row("mae depth=1", 0.44), architecture="small"),
        replace(row("random, large", 0.495, "untrained"), architecture="large"),
        replace(row("random, small", 0.20, "untrained"), architecture="small"),
    ]  # fmt: skip
    assert "helps: kNN 44.0 ± 1.0 % (mae depth=1) against 20.0 ± 1.0 % (random, small)" in table(*models).findings()[0]


def test_raw_pixels_alone_give_no_verdict() -> None:
    assert "elps" not in str(table(row("mae", 0.50), row("raw pixels", 0.30, "pixels")))


def test_what_is_missing_or_failed_is_said() -> None:
    baseline = row("random initialisation", 0.30, "untrained")
    found = table(row("mae", 0.50), replace(row("bim", 0.45), seeds=1), baseline, failed=("bim, seed 1 (no room)",))
    assert found.findings()[-2:] == [
        "Not finished: bim (1 of 3 seeds). What is said above holds so far.",
        "Failed: bim, seed 1 (no room). The same command tries again.",
    ]
    assert "Not finished" not in str(table(row("mae", 0.50), baseline, row("raw pixels", 0.2, "pixels"), planned=3))


def test_screening_is_said_also_if_all_went_on() -> None:
    rows = [replace(row(name, 0.5), screened=score(0.4, 0.03, 1)) for name in ("mae", "bim")]
    assert "interval (kNN) of every recipe reached that of the best: all went on." in str(table(*rows))


def test_one_recipe_is_not_the_best() -> None:
    assert "Best" not in str(table(row("mae", 0.50), row("random initialisation", 0.30, "untrained")))


def test_where_one_measure_says_so_and_another_does_not_what_helps_comes_first() -> None:
    rows = [
        replace(row(name, knn, kind), scores={"knn": score(knn), "linear": score(linear)})
        for name, knn, linear, kind in (
            ("mae", 0.31, 0.50, "recipe"),
            ("random initialisation", 0.30, 0.40, "untrained"),
        )
    ]
    found = table(*rows, measures=("knn", "linear")).findings()
    assert found[0].startswith("Pre-training helps: linear probe 50.0 ± 1.0 % (mae) against 40.0")
    assert found[1].startswith(
        "By other measures it is not shown to help on these data, for the difference is within the spread: kNN 31.0 ± 1.0 % (mae) against 30.0"
    )
    assert "does not" not in " ".join(found)


def test_given_weights_that_are_better_are_to_start_from() -> None:
    baseline = row("random initialisation", 0.30, "untrained")
    better = table(row("mae", 0.40), baseline, row("vit.augreg", 0.80, "weights")).findings()
    assert "Given weights are better, start from them: kNN 80.0 ± 1.0 % (vit.augreg)." in better
    assert "start from them" not in " ".join(table(row("mae", 0.40), baseline, row("vit", 0.415, "weights")).findings())


def test_the_cheapest_within_the_spread_of_the_best() -> None:
    rows = [
        row("mae", 0.50, flops=4e12, memory_bytes=4 * 2.0**20),
        row("pr-mim", 0.495, flops=2e12, memory_bytes=3 * 2.0**20, seconds=605.0),
        row("bim", 0.492, flops=3e12, memory_bytes=2.0**20, seconds=700.0), row("fastmim", 0.45, flops=1e12, memory_bytes=2.0**10),
    ]  # fmt: skip
    assert list(table(*rows).worth()) == [
        "Best, kNN: mae; within its spread: pr-mim; bim. The cheapest of these: pr-mim (training FLOPs 2 TFLOP); "
        "bim (predicted peak memory 1 MiB)."
    ]
    (text,) = table(*rows, budget="flops").worth()
    assert (
        "mae (training time 10 min); pr-mim (training time 10.08 min); bim (predicted" in text
    )  # times less than 2 % apart
    assert list(table(rows[0], rows[3]).worth()) == ["Best, kNN: mae; no other recipe is within its spread."]


def test_one_seed_is_said() -> None:
    assert "Wilson" in table(row("mae", 0.5), planned=1).findings()[-1]
    assert "Wilson" not in str(table(row("mae", 0.5)))


def test_an_unfinished_table_says_nothing_yet() -> None:
    found = table(Row("recipe", "mae", 0, {}), Row("untrained", "random initialisation", 0, {}))
    assert found.findings() == []
    assert found.accuracies()[0] == {"recipe": "mae", "kNN, %": "-", "seeds": "0"}


def test_hopeless_is_whose_interval_does_not_reach_the_best() -> None:
    scores = [("a", score(0.5, 0.03)), ("b", score(0.445, 0.03)), ("c", score(0.43, 0.03)), ("d", score(0.1, 0.5))]
    assert promising(scores) == ["a", "b", "d"]


def test_a_notebook_shows_it_as_it_is_printed() -> None:
    own = table(row("mae", 0.5))
    assert own._repr_markdown_() == str(own) and "| mae" in str(own)


def test_markdown_has_columns_below_each_other() -> None:
    assert markdown([{"a": "1", "b": "x|y"}, {"a": "22", "b": "z"}]) == (
        "| a  | b    |\n| -- | ---- |\n| 1  | x\\|y |\n| 22 | z    |"
    )
