"""Which linear layers a setting means: regular expressions for whole names, each of which must match something."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

# all linears of all blocks
BLOCK_LINEARS = (
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])",
    r"single_blocks\.\d+\.linear[12]",
)


def linear_names(model: nn.Module, patterns: Sequence[str], setting: str) -> list[str]:
    """Names of the linear layers that any of `patterns` matches whole, in the order of the model.

    Raises:
        ValueError: naming `setting`; a pattern is no regular expression or matches no linear layer, or there is none.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(f"{setting}: {pattern!r} is not a regular expression ({error})") from error
        if not found:
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in linears)
            raise ValueError(
                f"{setting}: {pattern!r} matches no linear layer of the model. A target is a regular expression "
                f"for a whole name; the layers are {', '.join(kinds)}"
            )
        chosen.update(found)
    if not chosen:
        raise ValueError(f"{setting} is empty: name at least one layer")
    return [name for name in linears if name in chosen]
