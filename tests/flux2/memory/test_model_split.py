"""One model on several devices: which module is where, and what moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux2 import adapters
from flux2.memory.activation_checkpointing import set_policy, tensors_in
from flux2.memory.model_split import check_split, module_devices, split_devices, split_model
from flux2.models.transformer import Transformer
from flux2.weights.loading import device_chooser

CONFIG = helpers.TRANSFORMERS["dev"]  # two double blocks, three single blocks
FIRST, SECOND, THIRD = (torch.device("cuda", index) for index in range(3))
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("split", "there"),
    [
        ([1, 4], {"double_blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2", "final_layer"}),
        ([4, 1], {"single_blocks.2", "final_layer"}),
    ],
)
def test_the_last_blocks_and_the_final_layer_are_on_the_second_device(split: list[int], there: set[str]) -> None:
    assert module_devices(CONFIG, split, [FIRST, SECOND]) == dict.fromkeys(there, SECOND)


def test_three_devices_have_consecutive_blocks() -> None:
    devices = module_devices(CONFIG, [2, 1, 2], [FIRST, SECOND, THIRD])
    single = [f"single_blocks.{i}" for i in range(3)]
    assert devices == {single[0]: SECOND, single[1]: THIRD, single[2]: THIRD, "final_layer": THIRD}


def test_files_are_read_to_where_the_model_computes() -> None:
    """`single_blocks.1` is not taken for `single_blocks.10`, and blocks in host memory stay there."""
    with torch.device("meta"):
        model = Transformer(replace(CONFIG, single_blocks=12))
    model.devices = {"single_blocks.1": SECOND, "final_layer": SECOND}
    home = device_chooser(["double_blocks.0"], torch.device("meta"), model.devices)
    there = set()
    for name, _ in model.named_parameters():
        if not name.startswith("double_blocks.0."):
            assert home(name) == model.device_of(name), name
        if home(name) == SECOND:
            there.add(".".join(name.split(".")[:2]))
    assert there == {"single_blocks.1", "final_layer.linear", "final_layer.adaLN_modulation"}
    assert home("double_blocks.0.img_attn.qkv.weight") == torch.device("cpu")


@pytest.mark.parametrize("split", [[2, 2], [3, 3], [1, 1, 1]])
def test_numbers_that_do_not_add_up_are_refused(split: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"^memory\.split=.* has {sum(split)} blocks, .* add up to 5\."):
        check_split(CONFIG, split, "memory.split")


def test_the_named_device_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert split_devices(torch.device("cuda")) == [FIRST, SECOND, THIRD]
    assert split_devices(SECOND, 2) == [SECOND, FIRST]


@pytest.mark.parametrize(("count", "needed"), [(None, 2), (2, 2), (3, 3)])
def test_fewer_gpus_than_needed_are_an_error(monkeypatch: pytest.MonkeyPatch, count: int | None, needed: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=rf"^memory\.split=x needs {needed} GPUs, .* sees 1\. Set memory\.split=null"):
        split_devices(FIRST, count, "memory.split=x")
    with pytest.raises(ValueError, match=r"^memory\.split=x divides .* device=cpu\. Set memory\.split=null\.$"):
        split_devices(torch.device("cpu"), count, "memory.split=x")


class Moves(TorchDispatchMode):
    """Counts the tensors that are copied from device to device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten._to_copy:
            self.count += out.device != args[0].device
        return out


def divided(split: list[int], policy: str = "none") -> Transformer:
    """A model with an adapter whose first part is on the CPU and whose second part is on the meta device.

    Nothing comes back from the meta device, so a forward ends where the prediction would.
    """
    model = helpers.transformers("dev")[0]
    set_policy(model, policy)
    adapters.attach(model, rank=2)
    devices = module_devices(CONFIG, split, [CPU, META])
    for name, device in devices.items():
        model.get_submodule(name).to(device)
    split_model(model, devices)
    return model


def predict(model: Transformer) -> dict[str, set[torch.device]]:
    """Predict up to the last operation, which returns the prediction; return the devices of each module's inputs."""
    tokens, text = torch.ones(1, 6, CONFIG.channels), torch.ones(1, 3, CONFIG.text_width)
    at, text_at = (torch.ones(count, 4, dtype=torch.long) for count in (6, 3))
    seen: dict[str, set[torch.device]] = {}
    hooks = []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, name: str = name) -> None:
            seen[name] = {tensor.device for tensor in tensors_in(args)}

        if name:
            hooks.append(module.register_forward_pre_hook(note))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        model(tokens, at, text, text_at, torch.ones(1), torch.ones(1))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
@pytest.mark.parametrize("split", [[1, 4], [2, 3], [4, 1]])
def test_a_forward_has_all_its_tensors_on_the_device_of_each_block(split: list[int], policy: str) -> None:
    model = divided(split, policy)
    places = {tensor.device for tensor in model.parameters()}
    assert places == {CPU, META}
    assert all(tensor.device == model.device_of(name) for name, tensor in model.named_parameters())
    seen = predict(model)
    assert seen.keys() >= {*CONFIG.block_names, "img_in", "txt_in", "time_in", "final_layer", "final_layer.linear"}
    for name, devices in seen.items():
        assert devices == {model.device_of(name)}, name


@pytest.mark.parametrize(
    ("split", "moves"),
    [
        ([4, 1], 1 + 3 + 3 + 1),  # tokens, modulation, angles, time
        ([2, 3], 1 + 3 + 3 + 1),  # as many for three blocks as for one
        ([1, 4], 2 + 12 + 3 + 3 + 1),  # image and text, the modulation of double blocks too
    ],
)
def test_what_blocks_share_is_copied_once(split: list[int], moves: int) -> None:
    model = divided(split)
    runner: Any = model.run_block
    for _ in range(2):
        with torch.no_grad(), Moves() as moved:
            predict(model)
        assert moved.count == moves
        assert runner.copies == {}, "they are kept after the forward"
