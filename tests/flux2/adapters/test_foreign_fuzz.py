"""flux2.adapters.reading: a file with random faults is one AdapterError, or an adapter that is the same everywhere."""

import random
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from adapter_helpers import fresh, predict
from foreign_adapters import WRITERS, strengths_of, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2 import adapters
from flux2.adapters.formats import AdapterError
from flux2.export import deltas

State = dict[str, Tensor]


def rename(state: State, key: str, draw: random.Random) -> None:
    at = draw.randrange(len(key))
    state[key[:at] + draw.choice([".", "_", "x", "", "0", "base_model.model."]) + key[at + 1 :]] = state.pop(key)


def retype(state: State, key: str, draw: random.Random) -> None:
    state[key] = state[key].to(draw.choice([torch.int8, torch.bool, torch.float8_e5m2, torch.float64]))


def reshape(state: State, key: str, draw: random.Random) -> None:
    tensor = state[key]
    shapes = [tensor[:1], tensor.t(), tensor[None], tensor.flatten(), tensor[:0]] if tensor.ndim else [tensor[None]]
    state[key] = draw.choice(shapes).contiguous().clone()


def swap_side(state: State, key: str, draw: random.Random) -> None:
    for old, new in (("lora_A", "lora_B"), ("hada_w1", "lokr_w1"), ("lokr_w2", "hada_w2"), ("lora_up", "lora_down")):
        if old in key:
            state[key.replace(old, new)] = state[key].clone()


def set_alpha(state: State, key: str, draw: random.Random) -> None:
    state[f"{key.rpartition('.')[0]}.alpha"] = torch.tensor(draw.choice([0.0, -1, 3, 1e30, float("nan")]))


def remove(state: State, key: str, draw: random.Random) -> None:
    if len(state) > 1:
        del state[key]


FAULTS: list[Callable[[State, str, random.Random], None]] = [rename, retype, reshape, swap_side, set_alpha, remove]


@pytest.mark.parametrize("block", [pytest.param(i, marks=() if i == 0 else pytest.mark.slow) for i in range(40)])
def test_random_faults_are_one_error_or_an_adapter_that_is_the_same_everywhere(block: int, tmp_path: Path) -> None:
    base, accepted, refused = fresh(), 0, 0
    for seed in range(12 * block, 12 * block + 12):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        writer = WRITERS[draw.choice(list(WRITERS))]
        kind = draw.choice(writer.types)
        write(writer, kind, draw.choice(strengths_of(writer, kind)), torch.float32, folder, base)
        file = folder / writer.file
        state = load_file(file)
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        for _ in range(draw.randint(0, 2)):
            draw.choice(FAULTS)(state, draw.choice(list(state)), draw)
        save_file(state, file, header)
        place = folder if writer.file != "lora.safetensors" else file
        model = fresh()
        message, loaded = "", None
        try:
            loaded = adapters.load(model, place)
        except AdapterError as error:
            message = str(error)
        if loaded is None:
            refused += 1
            assert str(place) in message
            assert len(message) < 1500
            assert all(torch.equal(one, two) for one, two in zip(model.parameters(), base.parameters(), strict=True))
            with pytest.raises(AdapterError):
                deltas.read(place, base)
            continue
        accepted += 1
        unmerged, update = predict(model), deltas.read(place, base)
        adapters.merge(model)
        assert helpers.relative_error(predict(model), unmerged) <= 1e-4, seed
        assert tuple(update.layers) == loaded.layers
        for layer in update.layers:
            weight = base.get_parameter(f"{layer}.weight").detach()
            change = update.change(layer, weight, torch.device("cpu"))
            found = model.get_parameter(f"{layer}.weight").detach() - weight
            assert float((found - change).norm()) <= 1e-4 * float(change.norm()) + 1e-6 * float(weight.norm()), seed
    assert accepted
    assert refused
