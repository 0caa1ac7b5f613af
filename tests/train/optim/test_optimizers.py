import math
from functools import partial

import pytest
import torch
from hydra.utils import get_object
from message_helpers import holds
from torch import nn
from train_helpers import compose, refusal

from train.optim import Constant, Cosine, Linear, Restarts, StableDecay
from train.optim.optimizers import build_optimizer, check_installed, try_out
from train.optim.schedules import LearningRate
from train.stages.memory import load_config


def factors(schedule, steps):
    return [schedule.factor(step, steps) for step in range(steps)]


def test_constant_is_flat_from_the_first_step():
    assert factors(Constant(), 4) == [1.0] * 4


def test_warm_up_rises_in_equal_parts_and_reaches_the_whole_rate_after_its_steps():
    assert factors(Constant(warmup_steps=3), 6) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_linear_falls_in_equal_parts_after_the_warm_up_to_its_floor():
    assert factors(Linear(), 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(Linear(warmup_steps=2), 6) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert Linear(floor=0.1).factor(4, 4) == pytest.approx(0.1)


def test_cosine_is_half_a_wave_from_one_to_its_floor():
    assert factors(Cosine(), 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert Cosine(floor=0.2).factor(2, 4) == pytest.approx(0.6)
    assert Cosine(warmup_steps=1, floor=0.2).factor(5, 5) == pytest.approx(0.2)


def test_a_warm_up_may_be_a_share_of_the_steps():
    for schedule, same in ((Constant, Constant), (Cosine, Cosine), (StableDecay, StableDecay)):
        assert factors(schedule(warmup_steps=0.25), 8) == factors(same(warmup_steps=2), 8)
    assert factors(Constant(warmup_steps=0.25), 8) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])
    assert factors(Constant(warmup_steps=0.1), 4) == [1.0] * 4  # less than half a step


def test_restarts_are_several_cosines_each_from_the_whole_rate_to_its_floor():
    twice = factors(Restarts(cycles=2, floor=0.2), 8)
    assert twice == pytest.approx(2 * factors(Cosine(floor=0.2), 4))
    assert factors(Restarts(warmup_steps=2, cycles=3), 14)[2:] == pytest.approx(3 * factors(Cosine(), 4))
    assert factors(Restarts(cycles=1), 5) == factors(Cosine(), 5)
    assert Restarts(cycles=3, floor=0.1).factor(6, 6) == pytest.approx(0.1)


def test_stable_decay_is_flat_and_falls_in_equal_parts_at_the_end():
    assert factors(StableDecay(decay=0.4), 10) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert factors(StableDecay(warmup_steps=2, decay=0.5, floor=0.5), 10)[2:] == pytest.approx(
        [1, 1, 1, 1, 1, 0.875, 0.75, 0.625]
    )
    assert factors(StableDecay(decay=1), 4) == pytest.approx(factors(Linear(), 4))
    assert StableDecay(floor=0.1).factor(4, 4) == pytest.approx(0.1)


def test_a_run_shorter_than_its_warm_up_never_reaches_the_whole_rate():
    assert factors(Cosine(warmup_steps=9), 2) == pytest.approx([0.1, 0.2])


def test_a_rate_depends_on_the_step_alone_so_that_resuming_needs_no_state():
    schedule = Cosine(warmup_steps=3)
    forwards = factors(schedule, 10)
    assert [schedule.factor(step, 10) for step in reversed(range(10))] == forwards[::-1]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Constant(warmup_steps=-1), "schedule.warmup_steps=-1"),
        (lambda: Constant(warmup_steps=1.5), "schedule.warmup_steps=1.5"),
        (lambda: Constant(warmup_steps=1.0), "schedule.warmup_steps=1.0"),
        (lambda: Constant(warmup_steps=-0.1), "schedule.warmup_steps=-0.1"),
        (lambda: Constant(warmup_steps=True), "schedule.warmup_steps=True"),
        (lambda: Restarts(cycles=0), "schedule.cycles=0"),
        (lambda: Restarts(cycles=1.5), "schedule.cycles=1.5"),
        (lambda: StableDecay(decay=0), "schedule.decay=0"),
        (lambda: StableDecay(decay=1.1), "schedule.decay=1.1"),
        (lambda: Constant(warmup_steps="ten"), "schedule.warmup_steps='ten'"),
        (lambda: Cosine(floor=2), "schedule.floor=2"),
        (lambda: Linear(floor="x"), "schedule.floor='x'"),
    ],
)
def test_a_schedule_names_the_setting_that_it_refuses(make, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        make()


def test_an_optimizer_is_made_on_the_parameters_with_its_settings():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=0.5, betas=[0.8, 0.9], weight_decay=0.25), [parameter])
    (group,) = optimizer.param_groups
    assert group["params"] == [parameter]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.5, (0.8, 0.9), 0.25)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": "abc"}, r"optimizer\.lr='?abc'?"),
        ({"lr": None}, r"optimizer\.lr=(None|null)"),
        ({}, r"optimizer\.lr=(None|null)"),
        ({"lr": -1.0}, r"optimizer\.lr=-1\.0"),
        ({"lr": 0}, r"optimizer\.lr=0"),
        ({"lr": 1e-320}, r"optimizer\.lr=1e-320.* >= 1e-12"),
        ({"lr": 1.0, "eps": 1e-320}, r"optimizer\.eps=1e-320"),
        ({"lr": math.inf}, r"optimizer\.lr=inf"),
        ({"lr": 1.0, "betas": [0.9]}, r"optimizer\.betas=\[0\.9\]"),
        ({"lr": 1.0, "betas": [0.9, 7.0]}, r"optimizer\.betas=\[0\.9, 7\.0\]"),
        ({"lr": 1.0, "betas": [0.9, None]}, r"optimizer\.betas=\[0\.9, None\]"),
        ({"lr": 1.0, "weight_decay": "x"}, r"optimizer\.weight_decay='?x'?"),
        ({"lr": 1.0, "eps": math.nan}, r"optimizer\.eps=nan"),
    ],
)
def test_a_refused_setting_of_the_optimizer_is_named_with_its_value(settings, said):
    with pytest.raises(ValueError, match=said):
        build_optimizer(partial(torch.optim.AdamW, **settings), [nn.Parameter(torch.zeros(1))])


def test_the_rate_is_set_for_all_groups():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=1.0)
    LearningRate(optimizer, Constant(warmup_steps=3), 4).set(1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_the_rate_in_use_is_that_of_the_schedule_times_what_prodigy_found():
    parameter = nn.Parameter(torch.zeros(1))
    assert LearningRate(torch.optim.SGD([parameter], lr=0.25), Constant(), 1).value == 0.25
    optimizer = build_optimizer(partial(get_object("prodigyopt.Prodigy"), lr=0.5, d0=1e-3), [parameter])
    assert LearningRate(optimizer, Constant(), 1).value == 0.5e-3


def test_fused_is_for_the_gpu_unless_it_is_asked_for():
    parameter = nn.Parameter(torch.zeros(1))
    make = partial(torch.optim.AdamW, lr=1.0)
    assert build_optimizer(partial(make, fused="auto"), [parameter]).defaults["fused"] is None
    assert build_optimizer(partial(make, fused=True), [parameter]).defaults["fused"] is True

    class OnGpu(nn.Parameter):
        is_cuda = True

    assert build_optimizer(partial(make, fused="auto"), [OnGpu(torch.zeros(1))]).defaults["fused"] is True
    assert build_optimizer(partial(make, fused=False), [OnGpu(torch.zeros(1))]).defaults["fused"] is False


def test_muon_says_that_it_trains_matrices_only():
    make = partial(torch.optim.Muon, lr=1e-3)
    build_optimizer(make, [nn.Parameter(torch.zeros(2, 3))])
    wrong = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (2, 3, 4), (5,))]
    with pytest.raises(ValueError, match=r"muon.* 1 and 3 .*adapter=lora"):
        build_optimizer(make, wrong)


def test_an_optimizer_that_is_not_installed_names_the_extra(monkeypatch):
    check_installed("prodigyopt.Prodigy")
    monkeypatch.setattr("train.optim.optimizers.find_spec", lambda package: None)
    for package in ("prodigyopt", "schedulefree"):
        with pytest.raises(ValueError, match=rf"{package}\b.*flux2-lora\[optimizers\]"):
            check_installed(f"{package}.Some")
    check_installed("torch.optim.AdamW")  # of what every installation has nothing is asked
    check_installed(None)


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("adamw", "optimizer.betas=[0.9,0.999,0.5]", "0.999, 0.5"),
        ("adamw", "optimizer.weight_decay=1e300", "not finite"),
        ("adamw", "optimizer.fused=maybe", "optimizer.fused=maybe ... true ... false ... auto"),
        ("adamw", "+optimizer.amsgrad=2", "optimizer.amsgrad=2 ... true ... false"),
        ("prodigy", "optimizer.d_coef=a", "optimizer.d_coef=a ... number >= 1e-12"),
        ("prodigy", "optimizer.d_coef=0", "optimizer.d_coef=0 ... number >= 1e-12"),
        ("prodigy", "optimizer.d_coef=-1", "optimizer.d_coef=-1 ... number >= 1e-12"),
        ("prodigy", "optimizer.d0=1e-320", "optimizer.d0=1e-320 ... number >= 1e-12"),
        ("prodigy", "+optimizer.growth_rate=1", "optimizer.growth_rate=1 ... .inf"),
        ("lion", "optimizer.betas=[0.9]", "optimizer.betas=[0.9]"),
        ("muon", "optimizer.momentum=5", "optimizer.momentum=5"),
        ("muon", "+optimizer.ns_steps=0", "optimizer.ns_steps=0"),
        ("muon", "+optimizer.ns_coefficients=[1,2]", "optimizer.ns_coefficients=[1, 2] ... 3"),
        ("adafactor", "optimizer.eps=[null,0]", "optimizer.eps=["),
        ("adafactor", "optimizer.eps=1e-8", "optimizer.eps=1e-08"),
        ("schedulefree", "optimizer.weight_decay=a", "optimizer.weight_decay=a"),
        ("schedulefree", "optimizer.weight_decay=-1", "optimizer.weight_decay=-1"),
        ("schedulefree", "optimizer.betas=[2,2]", "optimizer.betas=[2, 2]"),
        ("schedulefree", "+optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1"),
        ("adamw_8bit", "+optimizer.min_8bit_size=a", "optimizer.min_8bit_size=a"),
    ],
)
def test_what_no_optimizer_can_mean_is_said_before_anything_is_loaded(name, setting, said):
    message = refusal("model=tiny", f"optimizer={name}", setting, task=load_config)
    assert holds(message, f"{setting.partition('=')[0].lstrip('+')} ... {said}"), message


def test_what_an_optimizer_sees_at_its_first_update_alone_is_said_with_its_settings():
    class Picky(torch.optim.SGD):
        def step(self, closure=None):
            raise TypeError("no such momentum")

    with pytest.raises(ValueError, match=r"no such momentum.*optimizer\.lr=0\.1"):
        try_out(partial(Picky, lr=0.1), torch.device("cpu"))


def test_a_beta_of_zero_may_be_written_as_an_integer():
    for name, target in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.Adam)):
        parameter = nn.Parameter(torch.ones(1))
        parameter.grad = torch.ones(1)
        make = partial(target, lr=0.5, betas=[0, 0.999])
        try_out(make, torch.device("cpu"))
        build_optimizer(make, [parameter]).step()
        assert parameter.item() < 1, name
    load_config(compose("model=tiny", "optimizer.betas=[0,0.999]"))


def test_what_an_optimizer_leaves_empty_may_be_left_empty():
    parameter = [nn.Parameter(torch.zeros(2, 2))]
    build_optimizer(partial(torch.optim.AdamW, lr=1.0, foreach=None, fused=None), parameter)
    build_optimizer(partial(torch.optim.Adafactor, lr=1.0, eps=[None, 1.0]), parameter)
    build_optimizer(partial(get_object("prodigyopt.Prodigy"), lr=1.0, beta3=None, growth_rate=math.inf), parameter)
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay=(None|null)"):
        build_optimizer(partial(torch.optim.AdamW, lr=1.0, weight_decay=None), parameter)


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        (["optimizer.lr=1e30"], 300, "optimizer.lr=1e+30 ... above ... AdamW"),
        (["optimizer.lr=1"], 300, "optimizer.lr=1 ... above ... AdamW"),  # left from Prodigy
        (["optimizer.lr=1e-9"], 300, "optimizer.lr=1e-09 ... below ... AdamW"),
        (["optimizer=prodigy"], 300, ""),
        (["optimizer=prodigy", "optimizer.lr=1e-4"], 300, "optimizer.lr=0.0001 ... below ... leave it at 1"),
        (["optimizer=prodigy", "optimizer.lr=30"], 300, "optimizer.lr=30 ... above ... leave it at 1"),
        (["optimizer=lion", "optimizer.lr=2e-3"], 300, "optimizer.lr=0.002 ... above ... Lion"),
        (["optimizer=schedulefree", "optimizer.lr=1"], 300, "optimizer.lr=1 ... above ... AdamWScheduleFree"),
        (["+experiment=demo", "optimizer=lion"], 300, ""),
        (["+experiment=demo"], 300, ""),
        (
            ["schedule=cosine", "schedule.warmup_steps=9"],
            9,
            "schedule.warmup_steps=9 ... steps=9 ... 90%",
        ),
        (["schedule=cosine", "schedule.warmup_steps=9"], 10, ""),
        (["schedule=restarts", "schedule.cycles=6"], 11, "schedule.cycles=6 ... 11"),
        (["schedule=restarts", "schedule.cycles=6", "schedule.warmup_steps=1"], 12, "schedule.cycles=6 ... 11"),
        (["schedule=restarts", "schedule.cycles=6"], 12, ""),
        (["schedule=wsd"], 4, "schedule.decay=0.2 ... 4"),
        (["schedule=wsd"], 5, ""),
        (
            ["optimizer.weight_decay=1e4", "optimizer.lr=1e-4"],
            300,
            "weight_decay=10000 ... lr=0.0001 ... 100% ... little",
        ),
        (["optimizer.weight_decay=1", "optimizer.lr=1e-2"], 300, ""),
        (["optimizer=prodigy", "optimizer.weight_decay=0.1"], 300, ""),
        (["optimizer=schedulefree", "+optimizer.warmup_steps=300"], 300, "optimizer.warmup_steps=300 ... steps=300"),
        (["optimizer=schedulefree", "+optimizer.warmup_steps=299"], 300, ""),
        (["optimizer=prodigy", "optimizer.d_coef=1e-9"], 300, "optimizer.d_coef=1e-09 ... far from 1"),
    ],
)
def test_what_is_hardly_meant_is_a_warning(settings, steps, said, capfd):
    load_config(compose("model=tiny", f"steps={steps}", *settings))
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [holds(line, said) for line in warnings] == ([True] if said else [])
