"""flux2.utils.checks: numbers of every library are taken, all else is an error that names the argument."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flux2.utils import checks


def test_numbers_of_numpy_are_numbers() -> None:
    assert checks.seeds(np.int64(3), 2) == [3, 4]
    assert checks.seeds(np.array([5, 7]), 2) == [5, 7]
    assert type(checks.steps(np.int32(4))) is int
    assert checks.guidance(np.float32(2.5)) == 2.5
    assert checks.guidance(1) == 1.0
    checks.size(np.int64(32), 16, 16)


def test_one_text_or_several_are_a_list() -> None:
    assert checks.strings("prompt", "a cup") == ["a cup"]
    assert checks.strings("prompt", ("a", "")) == ["a", ""]


@pytest.mark.parametrize(
    ("check", "kind", "message"),
    [
        (lambda: checks.integer("length", 0, 1), ValueError, r"length=0\b.*\b1$"),
        (lambda: checks.integer("length", True, 1), TypeError, r"length=True\b"),
        (lambda: checks.steps(10**12), ValueError, r"steps=1000000000000\b.*\b10000$"),
        (lambda: checks.steps(2.0), TypeError, r"steps=2\.0\b"),
        (lambda: checks.guidance(float("nan")), ValueError, r"guidance=nan\b"),
        (lambda: checks.guidance(float("inf")), ValueError, r"guidance=inf\b"),
        (lambda: checks.guidance(10**400), ValueError, "guidance="),
        (lambda: checks.guidance(1e300), ValueError, r"guidance=1e\+300\b.*-1000.*\b1000$"),
        (lambda: checks.guidance("4"), TypeError, "guidance='4'"),
        (lambda: checks.seeds("3", 1), TypeError, "seed='3'"),
        (lambda: checks.seeds(1.5, 1), TypeError, r"seed=1\.5\b"),
        (lambda: checks.seeds([1, None], 2), TypeError, r"seed=None\b"),
        (lambda: checks.seeds([1, 2], 1), ValueError, r"seed\b.*\b2\b.*\b1\b"),
        (lambda: checks.seeds(2**64 - 1, 2), ValueError, r"seed=18446744073709551616\b"),
        (
            lambda: checks.size(1600000, 1024, 16),
            ValueError,
            r"width=1600000\b.*height=1024\b.*\b67108864\b",
        ),
        (lambda: checks.size(16, 40, 16), ValueError, r"width=16\b.*height=40\b.*\b16\b"),
        (lambda: checks.size("16", 16, 16), TypeError, "width='16'"),
        (lambda: checks.strings("prompt", []), ValueError, r"prompt\b.*empty"),
        (lambda: checks.strings("prompt", 3), TypeError, r"prompt=3\b"),
        (lambda: checks.strings("prompt", ["a", None]), TypeError, r"prompt\b.*\bNone\b"),
        (lambda: checks.strings("prompt", "a\ud800"), ValueError, r"prompt='a\\ud800'.*Unicode"),
    ],
)
def test_what_cannot_be_is_one_error_that_names_it(
    check: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        check()
