"""Files and settings drawn at random: each is refused with a user error, or means what it says.

The number of examples is small in the fast set and large in the slow one; both are the same in every run.
"""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_helpers
import pytest
import torch
import train_helpers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from flux2 import adapters
from flux2.generate.requests import KEYS, read_lines
from train.cli.errors import USER_ERRORS, all_keys
from train.config.run_config import RunConfig

LONGEST = 20.0  # CPU seconds of one example: a loop without end, or a product of a billion


def examples(fast: int, slow: int) -> pytest.MarkDecorator:
    """Parametrize `count`: a short run in the fast set, a long one in the slow set."""
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def search(
    count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], *, may_refuse: bool = True
) -> None:
    """Call `check` with `count` values of `strategy`. An exception is a failure, unless it is a user error and `check`
    leaves it open what is refused.
    """
    refusals: list[str] = []
    passing = USER_ERRORS if may_refuse else ()

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(strategy)
    def example(value: Any) -> None:
        began = time.process_time()
        try:
            check(value)
        except passing as error:
            refusals.append(str(error).strip())
        assert time.process_time() - began < LONGEST

    example()
    assert all(refusals)


NUMBERS = st.sampled_from([0, -1, 1, 3, 0.5, 1e308, -1e308, 1e-320, float("inf"), float("nan"), 10**9, 10**400, True])
TEXTS = st.sampled_from(["", "x", "1e308", "null", "../..", "(a+)+$", "a\u2028b", "\x00", "\ud800", "{", "é" * 300])
SCALARS = st.none() | NUMBERS | TEXTS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "_target_", ""]), inner, max_size=2)
    ),
    max_leaves=5,
)

CONFIGURATIONS = [
    (),
    ("adapter=lokr", "optimizer=prodigy", "timesteps=mode", "weighting=bell", "schedule=wsd"),
    ("adapter=oft", "optimizer=lion", "timesteps=uniform", "weighting=cosmap", "schedule=restarts"),
    ("adapter=loha", "optimizer=muon", "schedule=linear", "preservation=prior", "tracker=wandb"),
    ("adapter=dora", "optimizer=schedulefree", "schedule=cosine", "preservation=base", "precision=nf4"),
]


@pytest.mark.parametrize("choices", CONFIGURATIONS, ids=lambda choices: choices[0] if choices else "defaults")
@examples(12, 200)
def test_a_setting_of_any_value_is_used_or_refused(choices: tuple[str, ...], count: int) -> None:
    composed = train_helpers.compose("model=tiny", "device=cpu", *choices)
    keys = [key for key in all_keys(composed) if not key.startswith("hydra")]

    def check(drawn: tuple[str, Any]) -> None:
        config: DictConfig = composed.copy()
        OmegaConf.update(config, drawn[0], drawn[1], merge=False, force_add=True)
        RunConfig(config).dry_run()

    search(count, st.tuples(st.sampled_from(keys), VALUES), check)


LAYERS = ("double_blocks.0.img_attn.proj", "single_blocks.1.linear2", "double_blocks.1.txt_attn.qkv")
DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool)
FORMATS = {
    "comfyui": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", "diffusion_model.{}.alpha"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
    "no prefix": ("{}.lora_A.weight", "{}.lora_B.weight", "{}.alpha"),
}
CHANGES = ("nothing", "drop", "transpose", "rename", "extra", "value", "dtype")


@st.composite
def adapter_files(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """A file's tensors, and the update of each layer in plain arithmetic; None if the file has to be refused."""
    model, names = adapter_helpers.fresh(), FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    state: dict[str, torch.Tensor] = {}
    keys: dict[str, list[str]] = {}
    for layer in draw(st.lists(st.sampled_from(LAYERS), min_size=1, unique=True)):
        linear, rank = model.get_submodule(layer), draw(st.integers(1, 4))
        keys[layer] = [name.format(layer.replace(".", "_") if "unet" in name else layer) for name in names]
        state[keys[layer][0]] = torch.randn(rank, linear.in_features, generator=generator)
        state[keys[layer][1]] = torch.randn(linear.out_features, rank, generator=generator)
        if draw(st.booleans()):
            state[keys[layer][2]] = torch.tensor(draw(st.sampled_from([0.5, 1.0, 4.0, -2.0, 64.0])))
    key, change, refused = draw(st.sampled_from(sorted(state))), draw(st.sampled_from(CHANGES)), True
    if change == "drop" and not key.endswith("alpha"):
        del state[key]
    elif change == "transpose" and state[key].ndim == 2:
        state[key] = state[key].T.contiguous()
    elif change == "rename":
        state[key + draw(st.text("ab.0_", min_size=1, max_size=3))] = state.pop(key)
    elif change == "extra":
        state[draw(st.text("lora_AB.x", max_size=9))] = torch.zeros(2, 2)
    elif change == "value":
        state[key] = state[key] * draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    elif change == "dtype":
        dtype = draw(st.sampled_from(DTYPES))
        state, refused = {name: tensor.to(dtype) for name, tensor in state.items()}, not dtype.is_floating_point
    else:
        refused = False
    return state, None if refused else {layer: plain_update(state, *keys[layer]) for layer in keys}


def plain_update(state: dict[str, torch.Tensor], a: str, b: str, alpha: str) -> torch.Tensor:
    """alpha / rank * B A in float64; without alpha B A."""
    scale = state[alpha].item() / state[a].shape[0] if alpha in state else 1.0
    return scale * (state[b].double() @ state[a].double())


def updates(place: Path) -> dict[str, torch.Tensor]:
    """What the adapter at `place` adds to the weights of `LAYERS`."""
    model = adapter_helpers.fresh()
    before = {layer: model.get_submodule(layer).weight.clone() for layer in LAYERS}
    adapters.load(model, place)
    adapters.merge(model)
    return {layer: model.get_submodule(layer).weight - before[layer] for layer in LAYERS}


def assert_updates(place: Path, expected: dict[str, torch.Tensor]) -> None:
    for layer, update in updates(place).items():
        plain = expected.get(layer, torch.zeros_like(update)).float()
        torch.testing.assert_close(update, plain, atol=1e-5 * max(1.0, plain.abs().max().item()), rtol=0)


@examples(60, 600)
def test_an_adapter_file_has_its_plain_update_or_is_refused(count: int, tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"

    def check(drawn: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]) -> None:
        state, expected = drawn
        save_file(state, file)
        if expected is None:
            with pytest.raises(adapters.AdapterError):
                updates(file)
        else:
            assert_updates(file, expected)

    search(count, adapter_files(), check, may_refuse=False)


@examples(40, 400)
def test_a_header_of_any_content_is_refused(count: int, tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"
    entry = VALUES | st.fixed_dictionaries({"dtype": SCALARS, "shape": VALUES, "data_offsets": VALUES})
    headers = st.dictionaries(st.sampled_from(["__metadata__", "x", f"{LAYERS[0]}.lora_A.weight"]), entry)

    def check(header: dict[str, Any]) -> None:
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        with pytest.raises(adapters.AdapterError):
            adapters.load(adapter_helpers.fresh(), file)

    search(count, headers | VALUES, check, may_refuse=False)


@examples(40, 400)
def test_an_adapter_config_of_any_value_changes_nothing_else_or_is_refused(count: int, tmp_path: Path) -> None:
    adapter_helpers.write_adapter(tmp_path)
    file, before = tmp_path / "adapter_config.json", updates(tmp_path)
    config = json.loads(file.read_text())
    meant = {"r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora"}

    def check(drawn: tuple[str, Any]) -> None:
        key, value = drawn
        file.write_text(json.dumps(config | {key: value}))
        scale = 1.0
        if key == "lora_alpha" and isinstance(value, int | float):
            scale = value / config[key]
        elif key.endswith("_pattern") and isinstance(value, dict):
            pass  # as in PEFT: a pattern that names no layer changes nothing
        elif key in meant and (value or config[key]) and value != config[key]:
            with pytest.raises(adapters.AdapterError):
                updates(tmp_path)
            return
        assert_updates(tmp_path, {layer: scale * update for layer, update in before.items()})

    search(count, st.tuples(st.sampled_from(sorted(config)), VALUES), check)


@examples(60, 600)
def test_lines_of_prompts_are_requests_or_are_refused(count: int, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    defaults = dict.fromkeys(KEYS) | {"out": tmp_path / "x.png", "seed": 0, "images": []}
    line = st.fixed_dictionaries({"prompt": st.text() | VALUES}, optional=dict.fromkeys(KEYS[1:], VALUES))

    def check(rows: list[Any]) -> None:
        file.write_text("\n".join(json.dumps(row, ensure_ascii=index % 2 == 0) for index, row in enumerate(rows)))
        requests = read_lines(file, defaults, lambda text: None)
        assert [request.prompt for request in requests] == [row["prompt"] for row in rows]

    search(count, st.lists(line | VALUES, min_size=1, max_size=3), check)
