"""Selection of linear layers by a setting: named presets, and regular expressions that match whole layer names.

In a single block, attention and mlp share two fused layers: `linear1` computes q, k, v and the input of the mlp, and
`linear2` takes both results. The presets `attention` and `mlp` therefore both contain these two; `double_attention` and
`double_mlp` select only the projections of double blocks.
"""

import re
from collections.abc import Sequence

import regex
from torch import nn

_SINGLE = r"single_blocks\.\d+\.linear[12]"
_DOUBLE = r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])"
_DOUBLE_ATTENTION = r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)"
_DOUBLE_MLP = r"double_blocks\.\d+\.(img|txt)_mlp\.[02]"

SECONDS = 1.0  # that matching one name may take; usual expressions take microseconds

# name: patterns of whole layer names; docs/adapters.md lists them with their share of the weights
PRESETS = {
    "blocks": (_DOUBLE, _SINGLE),
    "double_blocks": (_DOUBLE,),
    "single_blocks": (_SINGLE,),
    "attention": (_DOUBLE_ATTENTION, _SINGLE),
    "mlp": (_DOUBLE_MLP, _SINGLE),
    "double_attention": (_DOUBLE_ATTENTION,),
    "double_mlp": (_DOUBLE_MLP,),
    "image_stream": (r"double_blocks\.\d+\.img_(attn\.(qkv|proj)|mlp\.[02])",),
    "text_stream": (r"double_blocks\.\d+\.txt_(attn\.(qkv|proj)|mlp\.[02])",),
    "modulation": (r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin",),
    "all_linear": (r".*",),
}
BLOCK_LINEARS = PRESETS["blocks"]  # all linears of all blocks


def layer_kinds(names: Sequence[str]) -> str:
    """Return the distinct names for a message, with the block number as N."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in names))


def matching_names(names: Sequence[str], pattern: str) -> list[str]:
    """Return the `names` selected by a preset or fully matched by a regular expression.

    Raise `re.error` for an invalid expression and for one that takes too long, such as `(.*)*x`.
    """
    patterns = PRESETS.get(pattern, (pattern,))
    for one in patterns:
        re.compile(one)
    try:  # the package regex, because re has no time limit
        return [name for name in names if any(regex.fullmatch(one, name, timeout=SECONDS) for one in patterns)]
    except TimeoutError:
        raise re.error(f"it takes more than {SECONDS:g} s for a name; repeat less within it") from None
    except regex.error as error:
        raise re.error(str(error)) from error


def linear_names(model: nn.Module, patterns: Sequence[str], setting: str) -> list[str]:
    """Return the names of the linear layers that any of `patterns` (or presets) selects, in the order of the model.

    Raise ValueError, naming `setting`, if a pattern is no regular expression or matches no layer, or if there is none.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matches = matching_names(linears, pattern)
        except re.error as error:
            raise ValueError(f"{setting}: {pattern!r} is not a regular expression ({error})") from error
        if not matches:
            raise ValueError(
                f"{setting}: {pattern!r} matches no linear layer of the model. A target is a preset "
                f"({', '.join(PRESETS)}) or a regular expression for a whole name; the layers are "
                f"{layer_kinds(linears)}"
            )
        chosen.update(matches)
    if not chosen:
        raise ValueError(f"{setting} is empty: name at least one layer")
    return [name for name in linears if name in chosen]
