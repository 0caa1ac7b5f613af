"""Strength of loaded adapters by block and by time, a scale that changes later, and unloading."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from adapter_helpers import attached, base, predict, stirred
from torch import Tensor

from flux2 import adapters
from flux2.adapters import AdapterError
from flux2.adapters.strengths import parse_ranges
from flux2.adapters.tuners import adapter_layers
from flux2.models.transformer import Transformer

SMALL = helpers.TRANSFORMERS["klein"]


def saved(folder: Path, kind: str = "lora", seed: int = 3) -> Path:
    adapters.save(stirred(attached(kind, base()), seed=seed), folder, base="small")
    return folder


def at(model: Transformer, time: float) -> Tensor:
    """The prediction at a time."""
    inputs: dict[str, Any] = helpers.transformer_inputs(model.config)
    with torch.no_grad():
        return model(**inputs | {"timestep": torch.full_like(inputs["timestep"], time)})


def scaled_by_hand(place: Path, factors: dict[str, float]) -> Transformer:
    """A model with the adapter whose update is multiplied in the layers that begin like this."""
    model = base()
    adapters.load(model, place)
    for layer, module in adapter_layers(model).items():
        for beginning, factor in factors.items():
            if layer.startswith(beginning):
                module.lora_B["default"].weight.data *= factor
    return model


@pytest.mark.parametrize(
    ("ranges", "factors"),
    [
        ("double.0=0.5", {"double_blocks.0.": 0.5}),
        ("single=0", {"single_blocks.": 0.0}),
        ("double.0=2, single.0-1=0.25", {"double_blocks.0.": 2.0, "single_blocks.0.": 0.25, "single_blocks.1.": 0.25}),
        ("double=-1", {"double_blocks.": -1.0}),
    ],
)
def test_a_range_of_blocks_multiplies_the_update_of_its_layers(
    ranges: str, factors: dict[str, float], tmp_path: Path
) -> None:
    place, model = saved(tmp_path), base()
    adapters.load(model, place, ranges=ranges)
    assert torch.equal(predict(model), predict(scaled_by_hand(place, factors))), "powers of two round nothing"
    whole = base()
    adapters.load(whole, place)
    assert helpers.relative_error(predict(model), predict(whole)) > 1e-3
    adapters.merge(model)
    assert helpers.relative_error(predict(model), predict(scaled_by_hand(place, factors))) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_range_of_times_counts_above_its_first_and_up_to_its_last_time(kind: str, tmp_path: Path) -> None:
    place, model, whole, half = saved(tmp_path, kind), base(), base(), base()
    adapters.load(model, place, ranges="time.0.5-1=0,time.0-0.25=0.5")
    adapters.load(whole, place)
    adapters.load(half, place, scale=0.5)
    wanted = {1.0: base(), 0.75: base(), 0.5: whole, 0.375: whole, 0.25: half, 0.125: half}
    for time, other in [*wanted.items(), *reversed(wanted.items())]:
        assert helpers.relative_error(at(model, time), at(other, time)) <= 1e-6, time
    assert helpers.relative_error(at(whole, 0.75), at(base(), 0.75)) > 1e-3
    with pytest.raises(AdapterError, match=r"cannot merge default: its strength depends on the time"):
        adapters.merge(model)
    adapters.unload(model, "default")
    assert torch.equal(at(model, 0.375), at(base(), 0.375))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa", "dora", "loha", "lokr"])
def test_a_scale_that_changes_is_the_scale_of_a_new_load(kind: str, tmp_path: Path) -> None:
    place, model = saved(tmp_path, kind), base()
    adapters.load(model, place, scale=0.0, ranges="single.0=0.5")
    for scale in (0.75, -0.3, 1.0):
        adapters.set_scale(model, "default", scale)
        wanted = base()
        adapters.load(wanted, place, scale=scale, ranges="single.0=0.5")
        assert torch.equal(predict(model), predict(wanted)), scale
    assert helpers.relative_error(predict(model), predict(base())) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_what_is_unloaded_leaves_the_others_as_they_are_alone(kind: str, tmp_path: Path) -> None:
    places = [saved(tmp_path / str(seed), kind, seed) for seed in (1, 2, 3)]
    model, alone = base(), base()
    for i, place in enumerate(places):
        adapters.load(model, place, name=f"adapter_{i}", scale=0.5)
    adapters.load(alone, places[1], scale=0.5)
    adapters.unload(model, "adapter_0")
    adapters.unload(model, "adapter_2")
    assert torch.equal(predict(model), predict(alone))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    adapters.unload(model, "adapter_1")
    assert not adapter_layers(model)
    assert torch.equal(predict(model), predict(base()))
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in base().named_parameters()]
    adapters.load(model, saved(tmp_path / "dora", "dora"))  # of a type that did not add up


def test_layers_of_one_adapter_alone_are_those_of_the_base_again(tmp_path: Path) -> None:
    model = base()
    for name, targets in (("one", "img_attn"), ("two", "linear1")):
        wrapped = attached("lora", base(), targets=[rf".*{targets}.*"])
        adapters.save(stirred(wrapped), tmp_path / name, base="small")
        adapters.load(model, tmp_path / name, name=name)
    adapters.unload(model, "one")
    assert {layer.partition(".")[0] for layer in adapter_layers(model)} == {"single_blocks"}
    alone = base()
    adapters.load(alone, tmp_path / "two")
    assert torch.equal(predict(model), predict(alone))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ("triple=1", r"ranges=triple=1 is not a range .*double\.0-3=0\.5"),
        ("double", r"ranges=double is not a range"),
        ("double.0-3", r"ranges=double\.0-3 is not a range"),
        ("single=x", r"ranges=single=x is not a range"),
        ("single=nan", r"ranges=single=nan: the factor must be a finite number"),
        ("single=1e400", r"ranges=single=1e400: the factor must be a finite number"),
        ("double.1-0=1", r"ranges=double\.1-0=1: numbers of double blocks must ascend and be from 0 to 0"),
        ("single.0-9=1", r"ranges=single\.0-9=1: numbers of single blocks .* from 0 to 1"),
        ("time=1", r"ranges=time=1 is not a range"),
        ("time.0.5-1.5=1", r"ranges=time\.0\.5-1\.5=1: times must ascend and be from 0 to 1"),
        ("time.1-0.5=1", r"ranges=time\.1-0\.5=1: times must ascend"),
        ("single.0-1=1,single.1=0", r"ranges=single\.0-1=1,single\.1=0: .* overlap"),
        ("time.0.4-1=1,time.0-0.5=0", r"overlap"),
        ("single=1,,double=1", r"ranges= is not a range"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(ranges: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parse_ranges(ranges, SMALL)


def test_ranges_that_touch_in_time_do_not_overlap() -> None:
    assert parse_ranges("time.0-0.5=0,time.0.5-1=2", SMALL).of_time(0.5) == 0
    assert parse_ranges("", SMALL).of_time(0.5) == 1


def test_a_range_without_layers_and_ranges_of_an_oft_are_refused(tmp_path: Path) -> None:
    model = base()
    wrapped = attached("lora", base(), targets=[r".*linear1"])
    adapters.save(stirred(wrapped), tmp_path / "single", base="small")
    with pytest.raises(AdapterError, match=r"ranges=double=0 has no effect: the adapter has no layers"):
        adapters.load(model, tmp_path / "single", ranges="double=0")
    with pytest.raises(AdapterError, match=r"ranges=single=0: an OFT"):
        adapters.load(model, saved(tmp_path / "oft", "oft"), ranges="single=0")
    assert not adapter_layers(model)
