"""flux2.doctor.selftest: it passes as things are, and each comparison fails when what it compares is changed."""

import importlib
import re
import sys
from types import ModuleType

import pytest
import torch

from flux2.doctor import selftest
from flux2.models.variants import VARIANTS


def findings() -> dict[str, selftest.Finding]:
    return {finding.what: finding for finding in selftest.selftest()}


@pytest.fixture(scope="module")
def found() -> dict[str, selftest.Finding]:
    return findings()


def test_all_comparisons_are_made_and_pass(found: dict[str, selftest.Finding]) -> None:
    assert list(found) == list(selftest.CHECKS)
    assert [finding for finding in found.values() if finding.passed is not True] == []


BREAKS = {
    "text encoder layers": lambda patch: patch.setitem(VARIANTS, "klein_base_4b", VARIANTS["dev"]),
    "system message": lambda patch: patch.setattr(
        selftest, "SYSTEM_MESSAGE", selftest.SYSTEM_MESSAGE.replace("\n", " ")
    ),
    "latent normalization": lambda patch: patch.setattr(
        "flux2.models.autoencoder.patchify", lambda x: torch.nn.functional.pixel_unshuffle(x.transpose(2, 3), 2).mT
    ),
    "position ids": lambda patch: patch.setattr("flux2.models.positions.REFERENCE_SPACING", 1),
    "schedule": lambda patch: patch.setattr("flux2.sampling.empirical_mu", lambda tokens, steps: 1.15),
}


@pytest.mark.parametrize("what", list(selftest.CHECKS))
def test_a_comparison_fails_when_our_side_is_changed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "forward of the embedded model":  # diffusers calls the same function of torch: change only our module
        import flux2.models.transformer

        monkeypatch.setattr(flux2.models.transformer, "F", Functional())
    else:
        BREAKS[what](monkeypatch)
    with torch.no_grad():
        passed, said = selftest.CHECKS[what](importlib.import_module("diffusers"))
    assert passed is False
    assert said


class Functional:
    """torch.nn.functional with another gate."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch.nn.functional, "gelu" if name == "silu" else name)


def test_without_diffusers_it_says_that_nothing_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (finding,) = selftest.selftest()
    assert finding.passed is None
    assert "diffusers" in finding.detail


def test_a_diffusers_without_flux2_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("diffusers")
    old.__version__ = "0.30"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", old)
    (finding,) = selftest.selftest()
    assert finding.passed is None
    assert re.search(r"diffusers 0\.30\b.*FLUX\.2", finding.detail)


def test_a_comparison_that_breaks_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(diffusers: object) -> tuple[bool, str]:
        raise TypeError("a function\nwas renamed")

    monkeypatch.setattr(selftest, "CHECKS", {"one": broken, "system message": selftest.system_message})
    one, other = selftest.selftest()
    assert one.passed is None
    assert "TypeError: a function was renamed" in one.detail
    assert other.passed is True


def test_shapes_that_differ_are_no_small_difference() -> None:
    with pytest.raises(ValueError, match=r"shape.*\(2,\).*\(3,\)"):
        selftest.compare_values((torch.ones(2), torch.ones(3)))
