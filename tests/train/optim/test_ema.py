import pytest
import torch
from torch import nn
from train_helpers import adapter, compose, lines, run_training, same_tensors, values

from train.config.memory import choice_of
from train.loop import Trainer
from train.optim.ema import Ema, EvaluationWeights
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

EMA = "ema_decay=0.5"


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (2,))]


def move(all_parameters):
    with torch.no_grad():
        for parameter in all_parameters:
            parameter.add_(1.0)


def test_the_average_follows_its_formula_with_a_decay_that_warms_up():
    trained = parameters()
    ema = Ema(trained, decay=0.3)
    expected = [parameter.detach().double() for parameter in trained]
    for t in range(8):
        move(trained)
        ema.update()
        d = min(0.3, (1 + t) / (10 + t))
        expected = [d * old + (1 - d) * new.detach().double() for old, new in zip(expected, trained, strict=True)]
    assert min(0.3, 1 / 10) < 0.3 == min(0.3, 8 / 17)  # both branches were taken
    for average, value in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-6)


def test_an_update_that_was_left_out_is_no_update_of_the_average():
    trained = parameters()
    ema, other = Ema(trained, decay=0.9), Ema(trained, decay=0.9)
    for left_out in (False, True, True, False, True):
        move([] if left_out else trained)
        before = [average.clone() for average in ema.average]
        ema.update(torch.tensor(left_out))
        if left_out:
            assert all(map(torch.equal, ema.average, before))
        else:
            other.update()
    assert ema.updates == other.updates == 2
    assert all(map(torch.equal, ema.average, other.average))


def test_the_average_is_in_float32_whatever_the_parameters_are_in():
    trained = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    ema = Ema(trained, decay=0.999)
    with torch.no_grad():
        trained[0].mul_(2)
    for _ in range(3):
        ema.update()
    assert ema.average[0].dtype == torch.float32
    shown = EvaluationWeights(trained, torch.optim.SGD(trained, lr=1.0), 0.999)
    with shown.swapped():
        assert trained[0].dtype == torch.bfloat16


def test_swapping_shows_the_average_and_gives_back_every_bit_also_after_an_error():
    trained = parameters()
    shown = EvaluationWeights(trained, torch.optim.SGD(trained, lr=1.0), 0.9)
    move(trained)
    shown.update()
    before = [parameter.detach().clone() for parameter in trained]
    with shown.swapped():
        for parameter, average in zip(trained, shown.ema.average, strict=True):
            assert torch.equal(parameter, average)
        with shown.swapped():  # in itself it changes nothing
            assert torch.equal(trained[0], shown.ema.average[0])
        assert torch.equal(trained[0], shown.ema.average[0])
        assert torch.equal(shown.state_dict()["trained"][0], before[0])
    assert all(map(torch.equal, trained, before))
    with pytest.raises(RuntimeError, match="planted"), shown.swapped():
        raise RuntimeError("planted")
    assert all(map(torch.equal, trained, before))
    assert not torch.equal(before[0], shown.ema.average[0])


def test_without_an_average_nothing_is_swapped_copied_or_kept():
    trained = parameters()
    shown = EvaluationWeights(trained, torch.optim.SGD(trained, lr=1.0))
    assert shown.parts == {}
    with shown.swapped():
        assert shown._trained is None


def test_a_state_of_other_parameters_is_refused():
    trained = parameters()
    shown = EvaluationWeights(trained, torch.optim.SGD(trained, lr=1.0), 0.9)
    state = shown.parts["ema"].state_dict()
    with pytest.raises(ValueError, match="shape"):
        shown.parts["ema"].load_state_dict({**state, "average": state["average"][:1]})
    with pytest.raises(ValueError, match="shape"):
        shown.load_state_dict({"trained": [torch.zeros(4, 3), torch.zeros(2)]})


@pytest.mark.parametrize("given", ["1", "-0.1", "2", "x", "true"])
def test_a_decay_that_is_none_is_refused(given, small):
    with pytest.raises(ValueError, match=r"ema_decay="):
        load_config(compose(*small(f"ema_decay={given}")))


# ------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Kept between the tests of this file, which read them."""
    return {}


@pytest.fixture
def averaged(runs, small, tmp_path_factory):
    """A run of four steps with an average and dropout, its parameters' names in order, and the same without one."""
    if not runs:
        order = []
        run = Trainer.run

        def noted(self, first_step):
            order[:] = [name for name, value in self.peft_model.named_parameters() if value.requires_grad]
            return run(self, first_step)

        place = tmp_path_factory.mktemp("averaged")
        every = ["checkpoint_every=1", "validate_every=2", "adapter.dropout=0.1"]
        Trainer.run = noted
        try:
            for name, more in (("with", [EMA]), ("without", [])):
                runs[name] = run_training(compose(*small(f"output_dir={place / name}", *every, *more))).parent
        finally:
            Trainer.run = run
        runs["order"] = [name.replace(".default", "") for name in order]
    return runs


def part(folder, step, name):
    return torch.load(folder / "checkpoints" / f"step_{step:06d}" / f"{name}.pt", weights_only=True)


def test_what_is_saved_is_the_average_and_what_is_trained_is_beside_it(averaged):
    folder, plain = averaged["with"], averaged["without"]
    average = part(folder, 1, "ema")["average"]
    for step in (2, 3, 4):
        trained, state = part(folder, step, "trained")["trained"], part(folder, step, "ema")
        d = min(0.5, step / (9 + step))  # with step - 1 updates before
        average = [d * old + (1 - d) * new for old, new in zip(average, trained, strict=True)]
        assert state["updates"] == step
        for kept, value in zip(state["average"], average, strict=True):
            torch.testing.assert_close(kept, value, rtol=1e-5, atol=1e-7)
        saved = adapter(folder / "checkpoints" / f"step_{step:06d}")
        other = adapter(plain / "checkpoints" / f"step_{step:06d}")
        for name, kept, raw in zip(averaged["order"], state["average"], trained, strict=True):
            assert torch.equal(saved[name], kept)
            assert torch.equal(other[name], raw)  # training is not changed by it
    assert same_tensors(adapter(folder), saved)
    assert not same_tensors(adapter(folder), adapter(plain))


def test_it_changes_what_is_validated_and_nothing_that_is_trained(averaged):
    folder, plain = averaged["with"], averaged["without"]
    assert values(folder) == values(plain)
    assert values(folder, "grad_norm") == values(plain, "grad_norm")
    one, other = values(folder, "validation_loss"), values(plain, "validation_loss")
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_a_run_with_an_average_goes_on_to_the_bit(averaged, train):
    folder = averaged["with"]
    again = train(
        "again",
        EMA,
        "checkpoint_every=1",
        "validate_every=2",
        "adapter.dropout=0.1",
        f"resume={folder / 'checkpoints' / 'step_000002'}",
    )
    assert lines(again) == [line for line in lines(folder) if line["step"] > 2]
    assert same_tensors(adapter(again), adapter(folder))
    for name in ("ema", "trained", "optimizer"):
        one, other = part(again, 4, name), part(folder, 4, name)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_planner_counts_the_average_and_what_is_swapped_out(small):
    def phases(*more):
        run = load_config(compose(*small("validate_every=1", *more)))
        planner = Planner(workload_of(run, on_gpu=True))
        return planner, planner.predict(choice_of(run.composed["memory"])).phases

    planner, with_it = phases(EMA)
    without = phases()[1]
    count = 4 * sum(p.numel() for p in planner.job.model.parameters() if p.requires_grad)
    assert planner.adapter["its average"] == planner.swapped_of(planner.whole) == count > 0
    assert sum(with_it["step"].values()) == sum(without["step"].values()) + count
    assert sum(with_it["validation"].values()) == sum(without["validation"].values()) + 2 * count
