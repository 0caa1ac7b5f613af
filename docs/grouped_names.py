"""Griffe extension for mkdocstrings: `width, height: Pixels.` in a docstring documents both parameters.

Without it Griffe takes `width, height` for one name, and warns that the signature lacks it.
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^( {4})(\w+(?:, \w+)+)(:.*(?:\n {5,}.*)*)", re.MULTILINE)


class GroupedNames(griffe.Extension):
    """Give each name of a group an entry of its own, in every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ENTRY.sub(
                lambda entry: "\n".join(f"{entry[1]}{name}{entry[3]}" for name in entry[2].split(", ")),
                obj.docstring.value,
            )
