"""Times in sentences."""

import pytest

from train.utils.text import duration

CASES = {
    0: "0 s", 0.42: "0.4 s", 59: "59 s", 59.7: "1 min", 300: "5 min", 3590: "1 h 0 min", 3600: "1 h 0 min",
    19_300: "5 h 22 min", 86400: "1 day", 86400 * 3: "3 days", 1e12: "years",
}  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), CASES.items())
def test_times_have_one_or_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
