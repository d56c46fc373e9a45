"""The rules behind auto: pure functions of numbers."""

import pytest

from leanmim.auto import epochs_within, few_steps, images_a_step, peak_rate


@pytest.mark.parametrize(
    ("seen", "most", "batch"),
    [(1, 600, 32), (159_999, 600, 32), (320_000, 600, 64), (640_000, 600, 128), (10**9, 10**6, 256), (10**9, 20, 20)],
)
def test_a_step_has_as_many_images_as_leave_enough_steps(seen: int, most: int, batch: int) -> None:
    assert images_a_step(seen, most) == batch


def test_the_learning_rate_is_maes_at_its_own_batch_and_scales() -> None:
    assert peak_rate(4096) == 2.4e-3
    assert peak_rate(1024) == pytest.approx(1.2e-3)


def test_epochs_fit_the_time_and_end_somewhere() -> None:
    assert epochs_within(1.0, 10.0, 600) == 60
    assert epochs_within(1.0, 10.0, 10**6) == 0.036
    assert epochs_within(1.0, 10.0, 610) == 59
    assert epochs_within(1.0, 10.0, 7000) == 5.14
    assert epochs_within(100.0, 1000.0, 600) == 2_000_000 // 600
    assert epochs_within(1000.0, 10_000.0, 10**5) == 800


def test_few_steps_are_warned_of() -> None:
    (text,) = few_steps(129)
    assert text.startswith("only 129 optimizer steps")
    assert all(option in text for option in ("--epochs", "--hours", "--batch-size", "--input-size"))
    assert list(few_steps(1000)) == []
