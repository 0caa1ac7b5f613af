"""flux2.adapters.warm_start: a new adapter begins as a saved one of any format, padded, and what does not fit is
refused."""

from pathlib import Path

import pytest
import torch
from adapter_helpers import TYPES, attached, base, predict, stirred
from helpers import relative_error, transformer_inputs
from message_helpers import holds
from safetensors.torch import save_file

from flux2 import adapters
from flux2.adapters.files import adapter_parameters, layer_pairs
from flux2.adapters.formats import AdapterError, to_comfyui, to_diffusers, to_kohya
from flux2.adapters.tuners import adapter_tensors
from flux2.adapters.warm_start import attach_frozen, start_from

# (the factor that is zero in new directions, the factor that is not) of each product
FACTORS = {"loha": [("hada_w1_a", "hada_w1_b"), ("hada_w2_b", "hada_w2_a")]}
FACTORS |= {key: [("lora_B.weight", "lora_A.weight")] for key in ("lora", "rslora", "dora")}
FACTORS["lokr"] = [("lokr_w2_a", "lokr_w2_b")]
FEWER = ["double_blocks"]


def saved(folder: Path, kind: str, **options):
    """A moved adapter, and the folder that it is saved in."""
    wrapped = stirred(attached(kind, base(), **options))
    adapters.save(wrapped, folder, base="small")
    return wrapped, folder


def state(wrapped):
    return {
        key: tensor.detach().clone() for key, tensor in adapter_tensors(wrapped.get_base_model(), "default").items()
    }


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "pissa"])
def test_an_adapter_of_the_same_settings_continues_bit_for_bit(kind, tmp_path):
    old, folder = saved(tmp_path, kind)
    new = attached(kind, base(), seed=5)
    start = start_from(new, folder)
    assert (start.new_layers, len(start.adapter.layers)) == (0, 12)
    before, after = state(old), state(new)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(predict(old), predict(new))
    assert not torch.equal(predict(old), predict(base()))
    assert all(tensor.requires_grad for tensor in adapter_tensors(new.get_base_model(), "default").values())


@pytest.mark.parametrize(
    ("kind", "onto"),
    [("lora", "lora"), ("rslora", "lora"), ("lora", "rslora"), ("dora", "dora"), ("loha", "loha"), ("lokr", "lokr")],
)
def test_a_larger_rank_another_alpha_and_more_layers_begin_with_its_prediction_and_learn(kind, onto, tmp_path):
    rank, larger = (2, 3) if kind == "lokr" else (4, 7)  # a LoKr of more trains whole matrices here
    old, folder = saved(tmp_path, kind, targets=FEWER, rank=rank)
    new = attached(onto, base(), rank=larger, alpha=5, seed=5)
    untrained = state(new)
    start = start_from(new, folder)
    assert (start.new_layers, len(start.adapter.layers)) == (4, 8)
    assert relative_error(predict(new), predict(old)) <= 1e-6
    assert relative_error(predict(base()), predict(old)) > 1e-3
    tensors = adapter_tensors(new.get_base_model(), "default")
    model = new.get_base_model()
    model(**transformer_inputs(model.config)).square().mean().backward()
    for layer in start.adapter.layers:
        for zeros, kept in FACTORS[kind]:  # of each product's new part one factor is zero, and gets a gradient
            columns, rows = sorted((zeros, kept), key=lambda key: key.endswith(("_A.weight", "_b")))
            parts = {columns: tensors[f"{layer}.{columns}"][:, rank:], rows: tensors[f"{layer}.{rows}"][rank:]}
            grads = {
                columns: tensors[f"{layer}.{columns}"].grad[:, rank:],
                rows: tensors[f"{layer}.{rows}"].grad[rank:],
            }
            assert not parts[zeros].any()
            assert parts[kept].all()
            assert grads[zeros].any()
            fresh = untrained[f"{layer}.{kept}"]
            assert torch.equal(parts[kept], fresh[rank:] if kept == rows else fresh[:, rank:])


@pytest.mark.parametrize("write", [to_kohya, to_comfyui, to_diffusers])
def test_a_file_of_another_program_starts_it_with_one_digest_for_all(write, tmp_path):
    old, folder = saved(tmp_path / "peft", "lora")
    file = tmp_path / "other.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in write(layer_pairs(old.get_base_model())).items()}, file)
    new = attached("lora", base(), seed=5)
    start = start_from(new, file)
    assert relative_error(predict(new), predict(old)) <= 1e-6
    assert start.digest == start_from(attached("lora", base()), folder).digest
    changed = stirred(old, by=1e-3)
    adapters.save(changed, folder, base="small")
    assert start.digest != start_from(attached("lora", base()), folder).digest


def test_a_saved_pissa_is_trained_further_as_a_lora_of_twice_the_rank(tmp_path):
    old, folder = saved(tmp_path, "pissa")
    new = attached("lora", base(), rank=8)
    start_from(new, folder)
    assert relative_error(predict(new), predict(old)) <= 1e-5


def test_a_quantized_base_and_a_model_without_memory_start_too(tmp_path):
    _, folder = saved(tmp_path, "lora")
    new = attached("lora", base("nf4"))
    start_from(new, folder)
    assert all(tensor.any() for tensor in state(new).values())
    with torch.device("meta"):
        model = type(base())(base().config)
        start_from(attached("lora", model), folder)  # checks only


@pytest.mark.parametrize(
    ("kind", "options", "onto", "other", "said"),
    [
        ("lora", {}, "lora", {"rank": 3}, "rank is 4 ... new adapter's 3. Set adapter.rank=4 ... flux2.export --rank"),
        ("loha", {}, "loha", {"rank": 3}, "rank is 4 ... adapter.rank=4"),
        ("lora", {}, "lora", {"targets": FEWER}, "adapter.targets does not have ... single_blocks"),
        ("dora", {}, "lora", {}, "it is a DoRA, and the new adapter is a LoRA. Set adapter=dora"),
        ("lora", {}, "dora", {}, "it is a LoRA, and the new adapter is a DoRA. Set adapter=lora"),
        ("lora", {}, "loha", {}, "it is a LoRA ... Set adapter=lora"),
        ("lora", {}, "pissa", {}, "it is a LoRA ... PiSSA ... Use adapter=lora"),
        ("oft", {}, "oft", {"block_size": 8}, "oft_R.weight has shape ... Set the adapter's settings as they were"),
        ("oft", {}, "oft", {"exact": True}, "use_cayley_neumann is True ... False"),
        ("lokr", {"decompose_both": True, "rank": 2}, "lokr", {"rank": 2}, "which the new adapter does not"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind, options, onto, other, said, tmp_path):
    _, folder = saved(tmp_path, kind, **options)
    new = attached(onto, base(), **other)
    before = state(new)
    with pytest.raises(AdapterError) as raised:
        start_from(new, folder)
    assert holds(str(raised.value), f"adapter.init={str(folder)!r}: ... {said}")
    assert all(torch.equal(one, other) for one, other in zip(before.values(), state(new).values(), strict=True))


def test_a_path_without_an_adapter_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter\.init='/nowhere': does not exist\. Give an adapter folder"):
        start_from(attached("lora", base()), "/nowhere")


# ------------------------------------------------------------------ next to a frozen one


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_lora_next_to_a_frozen_one_begins_with_its_prediction_and_trains_alone(precision, tmp_path):
    close = 1e-5 if precision == "fp32" else 1e-2  # activations in bfloat16
    old, folder = saved(tmp_path, "rslora")
    new = attached("lora", base(precision), targets=[*FEWER, r"single_blocks\.0\.linear1"], alpha=3)
    trained = adapter_parameters(new)
    before = predict(new)
    start = attach_frozen(new, folder)
    assert len(start.adapter.layers) == 12
    assert [id(one) for one in adapter_parameters(new)] == [id(one) for one in trained]
    alone = base(precision)
    adapters.load(alone, folder)
    assert relative_error(predict(new), predict(alone)) <= close
    assert relative_error(predict(new), before) > 5 * close
    stirred(new)
    adapters.save(new, tmp_path / "new", base="small")
    adapters.load(alone, tmp_path / "new", name="second")
    assert relative_error(predict(new), predict(alone)) <= close
    assert relative_error(predict(new), predict(old)) > 5 * close
    with adapters.adapters_disabled(new):
        assert torch.equal(predict(new), predict(base(precision)))


def test_its_gradient_is_that_on_a_base_with_the_frozen_one_merged_and_the_layers_are_fused(tmp_path):
    _, folder = saved(tmp_path, "lora")
    new = stirred(attached("lora", base(), alpha=3, targets=FEWER))
    merged = base()
    adapters.load(merged, folder)
    adapters.merge(merged)
    other = stirred(attached("lora", merged, alpha=3, targets=FEWER))
    start = attach_frozen(new, folder)
    names = {module.plain_adapter() for module in new.modules() if hasattr(module, "plain_adapter")}
    assert names == {"default", "_frozen"}
    for wrapped in (new, other):
        model = wrapped.get_base_model()
        model(**transformer_inputs(model.config)).square().mean().backward()
    for one, expected in zip(adapter_parameters(new), adapter_parameters(other), strict=True):
        torch.testing.assert_close(one.grad, expected.grad, rtol=1e-4, atol=1e-7)
        assert one.grad.untyped_storage().nbytes() == one.nbytes  # no view of the gradients of both
    frozen = adapter_tensors(new.get_base_model(), "_frozen")
    assert len(frozen) == 2 * len(start.adapter.layers)
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in frozen.values())
    detached = adapters.detach(new)
    assert torch.equal(predict(detached), predict(base()))


@pytest.mark.parametrize(("kind", "onto"), [("dora", "lora"), ("lora", "dora"), ("loha", "loha"), ("lora", "pissa")])
def test_only_two_loras_add_up_and_another_is_refused(kind, onto, tmp_path):
    _, folder = saved(tmp_path, kind)
    new = attached(onto, base())
    before = predict(new)
    with pytest.raises(AdapterError, match=r"adapter\.init=.*frozen adds up two LoRAs, and not a .*adapter=lora"):
        attach_frozen(new, folder)
    assert torch.equal(predict(new), before)
