"""flux2.layers.attention: the backends that are tried, and GPUs whose kernels cannot take bfloat16."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from checkpointing_helpers import train_once
from torch import Tensor

from flux2.layers import attention as module
from flux2.layers.attention import BACKENDS, attention, computes_in_float32, cudnn_failure, preferred_backends

CUDA = torch.device("cuda")


def test_cudnn_comes_first_from_hopper_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cudnn_failure", lambda device: None)
    for capability, expected in (((8, 9), None), ((9, 0), tuple(BACKENDS)), ((12, 0), tuple(BACKENDS))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert preferred_backends(None, CUDA) == expected
    assert preferred_backends(["math", "cudnn"], CUDA) == ("math", "cudnn")
    assert preferred_backends(None, torch.device("cpu")) is None
    assert preferred_backends(["math"], torch.device("cpu")) == ("math",)


def test_cudnn_without_a_plan_gives_way_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cudnn_failure", lambda device: "no plan")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match=r"cuDNN cannot compute attention here \(no plan\); flash, efficient, math"):
        assert preferred_backends(None, CUDA) == ("flash", "efficient", "math")
    with pytest.warns(UserWarning, match="math are tried"):
        assert preferred_backends(["cudnn", "math"], CUDA) == ("math",)
    with pytest.raises(ValueError, match=r"memory\.attention=\['cudnn'\]: cuDNN cannot .*\(no plan\)\. Give null"):
        preferred_backends(["cudnn"], CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preferred_backends(["flash"], CUDA) == ("flash",)  # whoever does not name it hears nothing of it


def test_what_is_tried_has_to_agree_with_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has flash and math: math stands for cuDNN, right and wrong."""
    monkeypatch.setattr(module, "BACKENDS", {**BACKENDS, "cudnn": BACKENDS["math"]})
    cpu = torch.device("cpu")
    assert cudnn_failure.__wrapped__(cpu) is None
    original, calls = F.scaled_dot_product_attention, iter([0.9, 1.0])
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: original(*args) * next(calls))
    assert cudnn_failure.__wrapped__(cpu) == "its result differs from flash attention's"

    def fail(*args: Tensor) -> Tensor:
        raise RuntimeError("no execution plans support the graph.\nat line 1")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    assert cudnn_failure.__wrapped__(cpu) == "no execution plans support the graph."


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_attention_in_float32_takes_no_lower_precision_from_autocast(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not computes_in_float32(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert computes_in_float32(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not computes_in_float32(CUDA)

    monkeypatch.setattr(module, "computes_in_float32", lambda device: True)
    original, seen = F.scaled_dot_product_attention, []

    def watch(*args: Tensor) -> Tensor:
        out = original(*args)
        seen.append({tensor.dtype for tensor in (*args, out)})
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    q = torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*q)
        train_once(policy, 0.0)
    assert seen
    assert all(dtypes == {torch.float32} for dtypes in seen)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, original(*q.float()).bfloat16())
