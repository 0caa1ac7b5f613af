"""T-LoRA: the active rank follows its formula, in training and in sampling, and no other program's file is written."""

import pytest
import torch
from adapter_helpers import attached, base, draw_adapter, predict
from helpers import relative_error, transformer_inputs
from message_helpers import holds

from flux2 import adapters
from flux2.adapters import adapter_parameters
from flux2.adapters.files import format_notes
from flux2.adapters.formats import AdapterError
from flux2.adapters.tlora import attach_tlora, read_schedule
from flux2.adapters.tuners import adapter_tensors
from flux2.adapters.warm_start import attach_frozen, start_from
from flux2.export import deltas
from flux2.layers.fused_lora import LoraProduct
from flux2.layers.rank_schedule import RankSchedule
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.compile_blocks import check_compiles

TIMES = (0.0, 0.25, 0.5, 0.99, 1.0)


def drawn(seed=0, **options):
    model = attach_tlora(base(), **({"rank": 8, "min_rank": 2, "exponent": 2.0, "alpha": 4} | options))
    draw_adapter(model, 0.3, seed)
    return model


def run(model, times):
    """The prediction for the small inputs at each of these timesteps, by the wrapper that training calls too."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    given = transformer_inputs(config)
    for key in ("tokens", "text"):
        given[key] = given[key][:1].expand(len(times), -1, -1)
    if given.get("guidance") is not None:
        given["guidance"] = given["guidance"][:1].expand(len(times))
    return model(**given | {"timestep": torch.tensor(times)})


def test_the_active_rank_is_that_of_the_formula_for_each_sample():
    schedule = RankSchedule(2, 2.0)
    schedule.observe(None, (), {"timestep": torch.tensor(TIMES)})
    assert schedule.active(8).tolist() == [int(2 + 6 * (1 - t) ** 2) for t in TIMES] == [8, 5, 3, 2, 2]
    mask = schedule.mask(8, torch.zeros(1))
    assert mask.sum(1).tolist() == [8, 5, 3, 2, 2]
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in mask)  # the first directions
    schedule.observe(None, (None,) * 4 + (torch.tensor([0.5]),), {})
    assert schedule.mask(4, torch.zeros(1, dtype=torch.bfloat16)).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_each_sample_is_predicted_and_trained_by_the_lora_of_its_active_rank(policy):
    model = drawn()
    set_policy(model.get_base_model(), policy)
    model.train()
    together = run(model, TIMES)
    together.square().sum().backward()
    grads = [torch.zeros_like(parameter) for parameter in adapter_parameters(model)]
    for i, (t, rank) in enumerate(zip(TIMES, (8, 5, 3, 2, 2), strict=True)):
        alone = attached("lora", base(), rank=8, alpha=4)
        for one, parameter in zip(adapter_parameters(alone), adapter_parameters(model), strict=True):
            one.data.copy_(parameter)
            one.data[(slice(rank, None),) if one.shape[0] == 8 else (slice(None), slice(rank, None))] = 0
        prediction = run(alone, [t])
        assert relative_error(together[i : i + 1], prediction) <= 1e-5
        prediction.square().sum().backward()
        for total, one in zip(grads, adapter_parameters(alone), strict=True):
            kept = (slice(0, rank),) if one.shape[0] == 8 else (slice(None), slice(0, rank))
            total[kept] += one.grad[kept]
    for parameter, expected in zip(adapter_parameters(model), grads, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_noisy_timesteps_train_only_the_first_directions():
    model = drawn()
    run(model, [1.0]).square().sum().backward()
    for name, tensor in adapter_tensors(model.get_base_model(), "default").items():
        tail, head = (
            (tensor.grad[2:], tensor.grad[:2]) if "lora_A" in name else (tensor.grad[:, 2:], tensor.grad[:, :2])
        )
        assert not tail.any(), name
        assert head.any(), name


def test_a_new_one_changes_nothing_and_a_product_with_a_mask_has_the_gradients_of_its_formula():
    model = attach_tlora(base(), rank=8)
    assert torch.equal(run(model, TIMES), run(base(), TIMES))
    linear = torch.nn.Linear(6, 5, bias=False, dtype=torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, a, b = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 6), (4, 6), (5, 4))
    )
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: LoraProduct.apply(linear, *given, 0.5, mask, ()), (x, a, b))
    expected = linear(x) + 0.5 * ((x @ a.T) * mask[:, None]) @ b.T
    torch.testing.assert_close(LoraProduct.apply(linear, x, a, b, 0.5, mask, ()), expected)


def test_it_is_saved_with_its_schedule_and_loads_with_it(tmp_path):
    model = drawn()
    adapters.save(model, tmp_path, base="small")
    assert not (tmp_path / "diffusers.safetensors").exists()
    assert "another adapter" in (tmp_path / "README.md").read_text()
    assert "flux2.export" not in (tmp_path / "README.md").read_text()
    assert holds(format_notes(tmp_path), "only flux2.generate reads this T-LoRA")
    loaded = base()
    report = adapters.load(loaded, tmp_path)
    assert (report.kind, set(report.ranks)) == ("T-LoRA", {8})
    assert relative_error(run(loaded, TIMES), run(model, TIMES)) <= 1e-6
    again = attach_tlora(base(), rank=8, min_rank=2, exponent=2.0, alpha=4, seed=7)
    adapters.restore(again, tmp_path)
    assert torch.equal(run(again, TIMES), run(model, TIMES))
    adapters.detach(again)
    assert torch.equal(run(again.get_base_model(), TIMES), run(base(), TIMES))
    assert not again.get_base_model()._forward_pre_hooks
    further = attach_tlora(base(), rank=12, min_rank=2, exponent=2.0, seed=7)
    start_from(further, tmp_path)
    assert relative_error(run(further, [1.0]), run(model, [1.0])) <= 1e-6  # as many directions as before


def test_what_would_lose_the_schedule_is_refused(tmp_path):
    model = drawn()
    for name in ("one", "other"):
        adapters.save(model, tmp_path / name, base="small")
    adapters.save(attached("lora", base()), tmp_path / "lora", base="small")
    loaded = base()
    adapters.load(loaded, tmp_path / "one")
    before = run(loaded, TIMES)
    with pytest.raises(AdapterError, match=r"cannot merge into .* T-LoRA depends on the timestep"):
        adapters.merge(loaded)
    for other in ("other", "lora"):
        with pytest.raises(AdapterError, match=r"cannot be combined with the loaded T-LoRA"):
            adapters.load(loaded, tmp_path / other, name="second")
    assert torch.equal(run(loaded, TIMES), before)
    with pytest.raises(AdapterError, match=r"T-LoRA depends on the timestep"):
        deltas.read(tmp_path / "one", base())
    with pytest.raises(ValueError, match=r"memory\.compile=true does not work with a T-LoRA"):
        check_compiles(model)
    with pytest.raises(AdapterError, match=r"it is a T-LoRA, and the new adapter is a LoRA\. Set adapter=tlora"):
        start_from(attached("lora", base(), rank=8), tmp_path / "one")
    with pytest.raises(AdapterError, match=r"its min_rank and exponent are others"):
        start_from(attach_tlora(base(), rank=8, min_rank=3), tmp_path / "one")
    with pytest.raises(AdapterError, match=r"frozen adds up two LoRAs, and not a T-LoRA"):
        attach_frozen(attached("lora", base()), tmp_path / "one")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_rank": 0}, "adapter.min_rank=0 must be an integer >= 1"),
        ({"min_rank": 8}, "adapter.min_rank=8 must be less than the rank ... 8 ... adapter=lora"),
        ({"rank_pattern": {"single_blocks": 2}}, "adapter.min_rank=2 ... least is 2"),
        ({"exponent": 0}, "adapter.exponent=0 must be a number from 0.01 to 100"),
        ({"exponent": "x"}, "adapter.exponent='x' must be"),
    ],
)
def test_a_schedule_without_effect_or_sense_is_refused(options, said):
    with pytest.raises(AdapterError) as raised:
        attach_tlora(base(), **({"rank": 8, "min_rank": 2} | options))
    assert holds(str(raised.value), said)


@pytest.mark.parametrize(
    "value", ["{", "[]", '{"min_rank": 0, "exponent": 1}', '{"min_rank": 1, "exponent": 1e9}', "[" * 9000]
)
def test_a_header_that_is_no_schedule_is_refused(value):
    with pytest.raises(AdapterError, match=r"invalid flux2_lora\.rank_schedule"):
        read_schedule({"flux2_lora.rank_schedule": value})
    assert read_schedule({}) is None


def test_a_prediction_of_the_small_inputs_moves():
    assert relative_error(predict(drawn()), predict(base())) > 1e-3
