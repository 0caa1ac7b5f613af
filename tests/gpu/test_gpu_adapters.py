"""Every type of adapter on a GPU. Everything here skips, saying so, on a machine without one."""

from typing import Any

import pytest
import torch

from flux2 import adapters
from flux2.adapters.tuners import attach, attach_dora, attach_loha, attach_lokr, attach_oft, attach_pissa, detach
from flux2.models.positions import image_positions, text_positions
from flux2.quantization.precision import Precision
from flux2.weights.loading import load_transformer
from flux2.weights.sources import model_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none"),
]
PRECISIONS = [
    Precision(),
    Precision(torch.bfloat16),
    Precision(torch.bfloat16, "fp8"),
    Precision(torch.bfloat16, "int8"),
    Precision(torch.bfloat16, "nf4"),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16", "fp8", "int8", "nf4"])
@pytest.mark.parametrize(
    "make",
    [
        attach,
        attach_dora,
        pytest.param(attach_pissa, marks=pytest.mark.gpu_values),  # its SVD is cuSOLVER's
        attach_loha,
        attach_lokr,
        attach_oft,
    ],
    ids=lambda make: make.__name__,
)
def test_every_type_begins_as_the_base_learns_and_is_taken_off(make: Any, precision: Precision) -> None:
    model = load_transformer(model_source("tiny"), "cuda", precision)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "tokens": torch.randn(2, 64, model.config.channels, generator=generator).cuda(),
        "positions": image_positions(8, 8).cuda(),
        "text": torch.randn(2, 8, model.config.text_width, generator=generator).cuda(),
        "text_positions": text_positions(8).cuda(),
        "timestep": torch.full((2,), 0.5, device="cuda"),
        "guidance": torch.ones(2, device="cuda") if model.config.guidance else None,
    }
    flow = torch.randn(inputs["tokens"].shape, generator=generator).cuda()

    def predicted() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision.dtype == torch.bfloat16):
            return model(**inputs).float()

    with torch.no_grad():
        before = predicted()
    wrapped = make(model)
    assert all(parameter.is_cuda for parameter in wrapped.parameters())
    with torch.no_grad():
        torch.testing.assert_close(predicted(), before, rtol=0, atol=0)
    optimizer = torch.optim.AdamW(adapters.adapter_parameters(wrapped), lr=5e-3)
    losses = []
    for _ in range(10):
        loss = (predicted() - flow).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    assert detach(wrapped) is model
    with torch.no_grad():
        torch.testing.assert_close(predicted(), before, rtol=0, atol=0)
