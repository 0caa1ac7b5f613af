"""Updates whose loss or gradient is not finite: left out exactly, named, and in the end the end of a run."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from message_helpers import holds
from torch import nn
from train_helpers import adapter, lines, same_tensors, values

from train import loop
from train.checkpoints.checkpoint import checkpoints
from train.loop import Trainer
from train.optim import update_guard as guarding
from train.optim.update_guard import Reading, TrainingError, UpdateGuard, clip
from train.utils.signals import SIGNALS, StopRequest

pytest_plugins = ("train_helpers",)


@pytest.fixture
def poison(monkeypatch):
    """`poison(3, 4)`: the losses of these steps (from 1) are not finite."""

    def plant(*steps, value=float("nan")):
        accumulate = Trainer.accumulate_gradients

        def planted(self, model, step):
            losses = accumulate(self, model, step)
            if step + 1 not in steps:
                return losses
            for parameter in self.peft_model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(value)
            return type(losses)(losses.total * value, losses.flow * value, losses.preservation)

        monkeypatch.setattr(Trainer, "accumulate_gradients", planted)

    return plant


def state(run, step):
    return torch.load(run / "checkpoints" / f"step_{step:06d}" / "optimizer.pt")["state"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_leaves_everything_as_it_was_and_is_named(train, poison, capfd, pictures, value):
    poison(3, value=value)
    run = train("run", "steps=5", "checkpoint_every=2", "max_nonfinite_steps=2")
    before, after = (adapter(run / "checkpoints" / f"step_{step:06d}") for step in (2, 4))
    assert not same_tensors(before, after)  # step 4 was made again
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert holds(said[0], f"step 3 ... loss ... {value:.4g} ... max_nonfinite_steps=2")
    assert said[0].count(".png") == 2  # the samples of its batch
    logged = {line["step"]: line for line in lines(run)}
    assert logged[3] == {"step": 3, "lr": 1e-2, "skipped": 1}
    assert "skipped" not in logged[4]
    assert all(torch.isfinite(tensor).all() for tensor in adapter(run).values())
    assert {int(of["step"]) for of in state(run, 4).values()} == {3}  # moments of three updates


def test_the_state_of_a_step_without_an_update_is_the_one_before_bit_for_bit(train, poison):
    poison(2)
    run = train("run", "steps=2", "checkpoint_every=1")
    (first,) = [state(run, 1)]
    second = state(run, 2)
    for parameter, held in first.items():
        for key, tensor in held.items():
            assert torch.equal(tensor, second[parameter][key])
    assert same_tensors(adapter(run / "checkpoints" / "step_000001"), adapter(run / "checkpoints" / "step_000002"))


def test_a_step_without_an_update_that_is_not_logged_is_logged_as_that(train, poison):
    poison(2)
    run = train("run", "log_every=3")
    assert [(line["step"], "loss" in line, line.get("skipped")) for line in lines(run)] == [
        (2, False, 1),
        (3, True, None),
        (4, True, None),
    ]


def test_after_several_in_a_row_training_stops_and_names_samples_and_the_last_good_checkpoint(train, poison, tmp_path):
    poison(2, 4, 5, 6)
    with pytest.raises(TrainingError, match=r"^step 6\b.* nan") as raised:
        train("run", "steps=9", "checkpoint_every=1", "max_nonfinite_steps=3")
    said = str(raised.value)
    assert set(re.findall(r"[^\s,]+\.png", said)) == set(names_at(tmp_path / "run", (3, 4, 5)))
    assert holds(said, "step_000003 ... optimizer.lr")
    kept = [path.name for path in checkpoints(tmp_path / "run")]
    assert kept == ["step_000001", "step_000003"]  # of step 2, which was no better than 1, none


def names_at(run, steps):
    """The samples of these steps (from 0), from the order that the run kept and the sampler's draws."""
    from data.sampler import BucketSampler

    names = json.loads((run / "data.json").read_text())["names"]
    sizes = [0 if name.rpartition("/")[2] < "4" else 1 for name in names]
    sampler = BucketSampler(sizes, 2, 0)
    return [names[index] for step in steps for index in sampler.batch(step)]


def test_a_checkpoint_that_was_due_at_a_bad_step_is_made_up_for_after_the_next_good_one(train, poison):
    poison(2, 3)
    run = train("run", "steps=5", "checkpoint_every=2")
    assert [path.name for path in checkpoints(run)] == ["step_000004", "step_000005"]


def test_bad_steps_from_the_first_on_blame_the_samples_and_the_files(train, poison):
    poison(*range(1, 9))
    with pytest.raises(TrainingError, match=r"step 2\b.*[Nn]o update"):
        train("run", "max_nonfinite_steps=2")


def test_a_gradient_alone_that_is_not_finite_is_as_bad(train, monkeypatch):
    monkeypatch.setattr(loop, "clip", lambda parameters, most: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match=r"step 1\b.* \d.*\binf\b.*[Nn]o update"):
        train("run", "max_nonfinite_steps=1")


@pytest.mark.parametrize(("bad", "ends"), [((4,), False), ((3, 4), True), ((1, 2, 3, 4), True)])
def test_a_run_that_ends_in_several_bad_steps_is_no_success(train, poison, bad, ends):
    poison(*bad)
    if not ends:
        assert (train("run") / "adapter").exists()
        return
    with pytest.raises(TrainingError, match=r"step 4\b.* nan"):
        train("run")


def test_a_poisoned_cache_entry_is_left_out_and_its_sample_named(train, monkeypatch, capfd):
    from data.loader import Loader

    read = Loader._read_batch

    def poisoned(self, step, indices, positions):
        batch = read(self, step, indices, positions)
        if step == 1:
            batch.latents[0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(Loader, "_read_batch", poisoned)
    run = train("run")
    assert holds(capfd.readouterr().err, "step 2 ... nan")
    assert len(values(run)) == 3


def test_numbers_are_read_from_the_device_only_where_they_are_logged_and_the_curve_is_the_same(train, monkeypatch):
    often = train("often", "steps=5", "adapter.dropout=0.2")
    read, original = [], Trainer.values

    def spy(self, losses, reading, clock):
        read.append(reading.step + 1)
        return original(self, losses, reading, clock)

    monkeypatch.setattr(Trainer, "values", spy)
    seldom = train("seldom", "steps=5", "adapter.dropout=0.2", "log_every=3")
    assert read == [3, 5]
    assert lines(seldom) == [line for line in lines(often) if line["step"] in (3, 5)]


# ------------------------------------------------------------------ what a device decides


def make(optimizer, most=2):
    device = torch.device("cpu")
    accelerator = SimpleNamespace(device=device, num_processes=1, is_main_process=True)
    return UpdateGuard(
        optimizer,
        accelerator,
        max_nonfinite_steps=most,
        is_untrained=False,
        sample_names=lambda step: ["x"],
        last_checkpoint=lambda: "none",
    )


def trained(fused):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    return parameter, optimizer


def test_an_optimizer_that_decides_on_the_device_leaves_out_what_the_host_would():
    """`found_inf` is what a GPU's fused kernels read; those of a CPU do too."""
    found = {}
    for fused in (False, True):
        parameter, optimizer = trained(fused)
        guard = make(optimizer)
        guard.on_device = fused
        for loss, gradient in ((1.0, 3.0), (float("nan"), float("nan")), (1.0, -2.0)):
            parameter.grad = torch.full_like(parameter, gradient)
            before = parameter.detach().clone(), [state.clone() for state in optimizer.state[parameter].values()]
            bad = guard.update(torch.tensor(loss), torch.tensor(abs(gradient)))
            assert bad.item() == (loss != loss)
            if bad:
                assert torch.equal(parameter, before[0])
                assert all(map(torch.equal, optimizer.state[parameter].values(), before[1]))
            else:
                assert not torch.equal(parameter, before[0])
            assert not hasattr(optimizer, "found_inf")
        found[fused] = parameter.detach()
        assert optimizer.state[parameter]["step"] == 2
    torch.testing.assert_close(found[False], found[True])


class FakeEvent:
    """A device that is a step behind: waiting for it is counted."""

    waited = 0

    def record(self):
        pass

    def synchronize(self):
        FakeEvent.waited += 1


@pytest.fixture
def far(monkeypatch):
    """A guard that takes the CPU for a GPU."""
    monkeypatch.setattr(guarding, "copy_to_device", lambda tensor, device: tensor)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(guarding, "pin", lambda tensor: tensor)
    monkeypatch.setattr(FakeEvent, "waited", 0)
    guard = make(trained(False)[1])
    guard.device = SimpleNamespace(type="cuda")
    return guard


def send(guard, step, loss=1.0, number=None, sample=False):
    request = StopRequest()
    request.number = number
    guard.queue_reading(step, torch.tensor(loss), torch.tensor(2.0), request, sample=sample)


def test_of_a_gpu_the_host_knows_a_step_when_the_next_one_is_under_way(far):
    send(far, 0)
    assert far.read_finished_steps(wait=False) == []
    assert FakeEvent.waited == 0
    send(far, 1, number=SIGNALS[1])
    (reading,) = far.read_finished_steps(wait=False)
    assert reading == Reading(0, 1.0, 2.0, None, sample=False)
    send(far, 2, sample=True)
    readings = far.read_finished_steps(wait=True)
    assert readings == [Reading(1, 1.0, 2.0, SIGNALS[1], sample=False), Reading(2, 1.0, 2.0, None, sample=True)]
    assert FakeEvent.waited == 3


def test_of_a_gpu_bad_steps_are_counted_when_they_are_known(far, capfd):
    send(far, 0, float("nan"))
    far.read_finished_steps(wait=False)
    send(far, 1, float("inf"))
    far.read_finished_steps(wait=False)
    assert holds(capfd.readouterr().err, "step 1 ... nan")
    with pytest.raises(TrainingError, match=r"step 2\b.* inf"):
        far.read_finished_steps(wait=True)


def test_an_adapter_that_the_last_update_ruined_is_not_kept(train, tmp_path, monkeypatch, capfd):
    """Loss and gradient of that step are finite, and there is no step after it to show the damage."""
    update = UpdateGuard.update

    def ruin(self, loss, norm):
        left_out = update(self, loss, norm)
        made.append(1)
        if len(made) == 2:
            self.optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))
        return left_out

    made: list[int] = []
    monkeypatch.setattr(UpdateGuard, "update", ruin)
    with pytest.raises(TrainingError, match=r"\b2 steps.*step_000001"):
        train("run", "steps=2", "checkpoint_every=1")
    assert "step_000002" in capfd.readouterr().err
    run = tmp_path / "run"
    assert [place.name for place in checkpoints(run)] == ["step_000001"]
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("most", [0, 0.5, 4.9999995, 5, 100, 5.0001])
def test_gradients_are_clipped_as_torch_clips_them(most):
    ours, theirs = ([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))] for _ in range(2))
    for parameters in (ours, theirs):
        parameters[0].grad = torch.tensor([3.0, 0.0, 0.0])
        parameters[1].grad = torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    norm = clip(ours, most)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, most or float("inf")))
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))


def test_clipping_keeps_a_norm_that_is_not_finite_for_the_guard_to_see():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, float("nan")])
    assert clip([parameter], 1.0).isnan()
