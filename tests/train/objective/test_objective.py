"""Runs with every part of the objective: resumed to the bit."""

import pytest
from train_helpers import adapter, lines, same_tensors

pytest_plugins = ("train_helpers",)

RESUMED = {
    "distance": [
        "loss=huber",
        "loss.delta_schedule=exponential",
        "timesteps=log_snr",
        "timesteps.max=0.97",
        "dataset.loss_weight=2",
    ],
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_run_goes_on_to_the_bit(train, settings):
    whole = train("whole", *settings, "checkpoint_every=2")
    rest = train("rest", *settings, "checkpoint_every=2", f"resume={whole / 'checkpoints' / 'step_000002'}")
    assert lines(rest) == [line for line in lines(whole) if line["step"] > 2]
    assert len(lines(whole)) == 4
    assert same_tensors(adapter(rest), adapter(whole))
