"""train.config.instantiate and train.cli.errors: settings become objects, and unknown keys are named."""

import dataclasses
from dataclasses import dataclass

import pytest
from message_helpers import holds

from train.cli.errors import format_error, known_settings
from train.config.instantiate import check_keys, instantiate, parse_settings, unknown_setting


def test_keys_are_compared_within_their_group_first():
    known = ["steps", "adapter", "adapter.rank", "sample.steps", "optimizer.lr"]
    assert holds(unknown_setting("adapter.rnk=4", known), "adapter.rnk=4 ... did you mean adapter.rank?")
    assert unknown_setting("sample.step", known).endswith("did you mean sample.steps?")
    assert unknown_setting("rank=4", known).endswith("did you mean adapter.rank?")
    assert holds(unknown_setting("adapter.foo=4", known), "adapter.foo=4 ... adapter.rank")
    assert unknown_setting("+text_encoder.token=hidden", known).startswith("text_encoder.token=...")
    assert holds(unknown_setting("nothing.foo=4", known), f"nothing.foo=4 ... {', '.join(known)}")


def test_the_known_settings_are_those_of_the_choices_made():
    assert "schedule.floor" not in known_settings([])
    assert "schedule.floor" in known_settings(["schedule=cosine", "adapter.rnk=3"])
    assert "schedule.floor" not in known_settings(["schedule=cosine", "model=foo"])  # does not compose
    assert {"steps", "adapter", "adapter.rank", "sample.prompts"} <= set(known_settings([]))


@dataclass(frozen=True)
class Settings:
    needed: int
    more: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.needed < 0:
            raise ValueError(f"needed={self.needed} must not be negative")


def test_a_group_becomes_its_dataclass_or_an_error_that_names_the_key():
    assert parse_settings("group", {"needed": 3}, Settings) == Settings(3)
    for given, said in (
        ({"needed": -1}, r"^group\.needed=-1"),
        ({}, r"^group\.needed\b"),
        ({"needed": 1, "mor": 2}, r"^group\.mor=2.* did you mean group\.more\?"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_settings("group", given, Settings)


def test_a_target_gets_its_settings_and_refuses_others(caplog):
    target = {"_target_": "train.optim.Cosine", "warmup_steps": 3}
    assert instantiate("schedule", target).warmup_steps == 3
    with pytest.raises(ValueError, match=r"^schedule\.flor=1.* did you mean schedule\.floor\?"):
        instantiate("schedule", target | {"flor": 1})
    with pytest.raises(ValueError, match=r"^schedule\.floor='?x"):
        instantiate("schedule", target | {"floor": "x"})
    with pytest.raises(ValueError, match=r"^schedule: .*Sine"):
        instantiate("schedule", {"_target_": "train.optim.Sine"})
    assert not caplog.records  # nor does Hydra say it once more


def test_a_function_that_takes_any_setting_is_given_them():
    assert instantiate("x", {"_target_": "types.SimpleNamespace", "anything": 1}).anything == 1


def test_what_is_given_later_is_no_setting():
    partial = {"_target_": "flux2.adapters.attach", "_partial_": True, "rank": 3}
    assert instantiate("adapter", partial, ["model", "seed"]).keywords == {"rank": 3}
    with pytest.raises(ValueError, match=r"adapter\.seed=1"):
        instantiate("adapter", partial | {"seed": 1}, ["model", "seed"])


def test_a_message_is_one_line_whatever_a_library_wrote():
    assert format_error(ValueError("one\n\n   two\tthree")) == "one two three"


def test_keys_of_the_top_have_no_prefix():
    with pytest.raises(ValueError, match=r"^b=1 .* a\.?$"):
        check_keys("", {"b": 1}, ["a"])
