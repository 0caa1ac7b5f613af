"""flux2.layers.selection: what presets and patterns mean on every model there is."""

import re
from functools import cache
from pathlib import Path

import helpers
import pytest
import torch
from torch import nn

from flux2.layers.selection import BLOCK_LINEARS, PRESETS, layer_kinds, linear_names, matching_names
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS

DOCS = Path(__file__).resolve().parents[3] / "docs" / "adapters.md"
CONFIGS = {name: variant.transformer for name, variant in VARIANTS.items()} | {
    f"small_{kind}": config for kind, config in helpers.TRANSFORMERS.items()
}


@cache
def model(name: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(CONFIGS[name])


def block(number: str, stream: str) -> list[str]:
    layers = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    return [f"double_blocks.{number}.{stream}_{layer}" for layer in layers]


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_are_these_layers_on_every_model(name: str) -> None:
    config = CONFIGS[name]
    double = [block(str(i), stream) for i in range(config.double_blocks) for stream in ("img", "txt")]
    single = [f"single_blocks.{i}.linear{j}" for i in range(config.single_blocks) for j in (1, 2)]
    both = [layer for part in double for layer in part]
    attention = [layer for part in double for layer in part[:2]]
    mlp = [layer for part in double for layer in part[2:]]
    wanted = {
        "blocks": both + single,
        "double_blocks": both,
        "single_blocks": single,
        "attention": attention + single,
        "mlp": mlp + single,
        "double_attention": attention,
        "double_mlp": mlp,
        "image_stream": [layer for layer in both if ".img_" in layer],
        "text_stream": [layer for layer in both if ".txt_" in layer],
        "modulation": [f"double_stream_modulation_{stream}.lin" for stream in ("img", "txt")]
        + ["single_stream_modulation.lin"],
        "all_linear": [layer for layer, module in model(name).named_modules() if isinstance(module, nn.Linear)],
    }
    assert wanted.keys() == PRESETS.keys()
    for preset, layers in wanted.items():
        found = linear_names(model(name), [preset], "adapter.targets")
        assert sorted(found) == sorted(layers)
        assert found == [layer for layer in wanted["all_linear"] if layer in set(layers)], "in the order of the model"
    assert linear_names(model(name), BLOCK_LINEARS, "") == linear_names(model(name), ["blocks"], "")


def test_presets_and_expressions_add_up() -> None:
    found = linear_names(model("small_klein"), ["double_attention", r"single_blocks\.1\..*", "image_stream"], "")
    wanted = [*block("0", "img"), *block("0", "txt")[:2], "single_blocks.1.linear1", "single_blocks.1.linear2"]
    assert sorted(found) == sorted(wanted)


def test_a_preset_that_means_nothing_here_is_an_error_that_names_the_others() -> None:
    bare = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\bx\b.*'attention'.*\bblocks, .*\b0\b"):
        linear_names(bare, ["attention"], "x")


def test_a_preset_hides_no_layer_of_its_name() -> None:
    for config in CONFIGS:
        linears = {name for name, module in model(config).named_modules() if isinstance(module, nn.Linear)}
        assert not linears & set(PRESETS)
    assert matching_names(["mlp.0", "a"], "mlp") == []
    assert layer_kinds(["double_blocks.1.x", "double_blocks.12.x", "y"]) == "double_blocks.N.x, y"


def test_the_documented_presets_are_these() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| ([\d.]+) M \|$", DOCS.read_text(), re.M)
    assert [name for name, _, _ in rows] == list(PRESETS)
    dev = model("dev")
    for preset, count, millions in rows:
        layers = [dev.get_submodule(name) for name in linear_names(dev, [preset], "")]
        assert len(layers) == int(count)
        trained = 16 * sum(layer.in_features + layer.out_features for layer in layers)
        assert f"{trained / 1e6:.1f}" == millions
