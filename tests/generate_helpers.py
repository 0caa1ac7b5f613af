"""The generate command as it makes pictures again: what its tests share."""

import sys

import pytest

from flux2.generate import command as generate


def repeat(*arguments: str) -> int:
    """The command without a prompt or sizes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", "--device", "cpu", *arguments])
        return generate.main()
