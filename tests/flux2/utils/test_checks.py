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
        (lambda: checks.integer("length", 0, 1), ValueError, "length=0 must be an integer >= 1"),
        (lambda: checks.integer("length", True, 1), TypeError, "length=True must be an integer, got bool"),
        (lambda: checks.steps(10**12), ValueError, "steps=1000000000000 must be an integer from 1 to 10000"),
        (lambda: checks.steps(2.0), TypeError, "steps=2.0 must be an integer"),
        (lambda: checks.guidance(float("nan")), ValueError, "guidance=nan must be a finite number"),
        (lambda: checks.guidance(float("inf")), ValueError, "guidance=inf must be a finite number"),
        (lambda: checks.guidance(10**400), ValueError, "must be a finite number"),
        (lambda: checks.guidance(1e300), ValueError, r"guidance=1e\+300 must be from -1000 to 1000"),
        (lambda: checks.guidance("4"), TypeError, "guidance='4' must be a number, got str"),
        (lambda: checks.seeds("3", 1), TypeError, "seed='3' must be an integer"),
        (lambda: checks.seeds(1.5, 1), TypeError, "seed=1.5 must be an integer"),
        (lambda: checks.seeds([1, None], 2), TypeError, "seed=None must be an integer"),
        (lambda: checks.seeds([1, 2], 1), ValueError, "seed has 2 values for 1 prompts"),
        (lambda: checks.seeds(2**64 - 1, 2), ValueError, "seed=18446744073709551616 must be an integer from"),
        (
            lambda: checks.size(1600000, 1024, 16),
            ValueError,
            "width=1600000, height=1024 are more than 67108864",
        ),
        (lambda: checks.size(16, 40, 16), ValueError, "width=16, height=40 must be multiples of 16"),
        (lambda: checks.size("16", 16, 16), TypeError, "width='16' must be an integer"),
        (lambda: checks.strings("prompt", []), ValueError, "prompt is an empty list"),
        (lambda: checks.strings("prompt", 3), TypeError, "prompt=3 must be a string or a list of strings"),
        (lambda: checks.strings("prompt", ["a", None]), TypeError, "prompt contains None"),
        (lambda: checks.strings("prompt", "a\ud800"), ValueError, r"prompt='a\\ud800' is not valid Unicode"),
    ],
)
def test_what_cannot_be_is_one_error_that_names_it(
    check: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        check()
