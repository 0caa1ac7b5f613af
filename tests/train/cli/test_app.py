"""The command line of train/: mistakes are one line with the key, the value and a remedy, and exit code 2."""

import re
import signal
import sys

import pytest
import torch
from message_helpers import holds
from train_helpers import execute, one_message, refusal

from flux2.models.variants import VARIANTS
from train import cache, caption, evaluate, plan
from train.stages.memory import unchosen_model
from train.utils.console import name_process_in_errors
from train.utils.signals import SIGNALS, Interrupted

pytest_plugins = ("train_helpers", "train_processes")


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("adapter.rnk=4", "adapter.rnk=4 ... adapter.rank?"),
        ("+adapter.rnk=4", "adapter.rnk=4 ... adapter.rank?"),
        ("stepz=3", "stepz=3 ... did you mean steps?"),
        ("+stepz=3", "stepz=3 ... did you mean steps?"),
        ("lr=1e-4", "lr=1e-4 ... optimizer.lr?"),
        ("modle=dev", "modle=dev ... model?"),
        ("+foo=1", "foo=1 ... seed, steps,"),
        ("+schedule.warmup=1", "schedule.warmup=1 ... schedule.warmup_steps?"),
        ("+optimizer.beta=1", "optimizer.beta=1 ... optimizer.betas?"),
        ("+sample.prompt=a", "sample.prompt=a ... sample.prompts?"),
        ("+tracker.mode=offline", "tracker.mode=offline"),
        ("+adapter.seed=3", "adapter.seed=3 ... adapter.rank"),
        ("experiment=debug", "experiment=debug ... +experiment=debug"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_known_ones(mistake, said):
    message = refusal(mistake)
    assert holds(message, said), message
    assert "append" not in message  # Hydra's advice for a misspelt key makes it worse


@pytest.mark.parametrize(
    "mistake", ["adapter.rnk=4", "steps=abc", "model=foo", "steps=[1", "dataset=folder", "~tracker"]
)
def test_of_the_command_a_refusal_is_one_line_and_exit_code_2(run_command, mistake):
    assert run_command.refused(mistake) == refusal(mistake)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("steps=abc", "steps=abc ... 1"),
        ("steps=1.5", "steps=1.5"),
        ("batch_size=0", "batch_size=0 ... 1"),
        ("caption_dropout=2", "caption_dropout=2 ... 0 ... 1"),
        ("name=a/b", "name=a/b ... slash"),
        ("name=.", "name=. ... slash"),
        ("name=..", "name=.. ... slash"),
        ("name=", "name= ... slash"),
        ("output_dir=3", "output_dir=3 ... 'output_dir=\"...\"'"),
        ("name=2024", "name=2024 ... 'name=\"...\"'"),
        ("hub.repo_id=1", "hub.repo_id=1 ... 'hub.repo_id=\"...\"'"),
        ("output_dir=", "output_dir= ... null"),
        ("resume=", "resume= ... null"),
        ("cache_dir=", "cache_dir="),
        ("optimizer.lr=abc", "optimizer.lr=abc ... number >= 1e-12"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]"),
        ("adapter.rank=four", "adapter.rank=four ... 1"),
        ("adapter.dropout=1", "adapter.dropout=1 ... 0"),
        ("timesteps.std=x", "timesteps.std=x ... positive"),
        ("schedule.warmup_steps=x", "schedule.warmup_steps=x ... 0"),
        ("text_encoder.length=0", "text_encoder.length=0 ... 1"),
        ("memory.checkpointing=some", "memory.checkpointing=some ... none, full"),
        ("memory.checkpointing=budget", "memory.budget_gb=None ... memory.checkpointing=budget"),
        ("memory.budget_gb=4", "memory.budget_gb=4 ... memory.checkpointing=budget ... full"),
        ("memory.compile=yes please", "memory.compile=yes please ... true ... false"),
        ("memory.attention=flash", "memory.attention=flash ... list"),
        ("memory.attention=[flash,flash]", "memory.attention=[flash, flash]"),
        ("memory.checkpointing=[1]", "memory.checkpointing=[1]"),
        ("precision.dtype=[1]", "precision.dtype=[1] ... null"),
        ("model.name=[a]", "model.name=[a]"),
        ("adapter.targets=null", "adapter.targets=None ... regular expression ... list"),
        ("adapter.targets=5", "adapter.targets=5 ... regular expression ... list"),
        ("adapter.targets=[5]", "adapter.targets=[5] ... regular expression ... list"),
        ("adapter._target_=null", "adapter._target_=None ... class"),
        ("adapter.rslora=maybe", "adapter.rslora=maybe ... true ... false"),
        ("adapter.alpha=nan", "adapter.alpha=nan ... 1e-06 ... 1e+06 ... null"),
        ("adapter.alpha=inf", "adapter.alpha=inf ... 1e-06 ... 1e+06 ... null"),
        ("adapter.rank=100000", "adapter.rank=100000 ... double_blocks.0.img_attn.qkv"),
        ("adapter.rank_pattern=0", "adapter.rank_pattern=0"),
        ("seed=-1", "seed=-1 ... 0"),
        ("seed=1.0", "seed=1.0"),
        ("seed=true", "seed=True"),
        ("seed=9223372036854775808", "seed=9223372036854775808 ... 2 ** 63"),
        ("precision.dtype=fp16", "precision.dtype=fp16 ... fp32, bf16"),
        ("buckets.step=17", "buckets.step=17 ... 16"),
        ("model.text_encoder=http://127.0.0.1:1", "text_encoder=remote text_encoder.url="),
        ("model.resolution=big", "model.resolution=big ... 16"),
        ("model.name=flux", "model=flux ... tiny, dev"),
        ("validation.held_out=-1", "validation.held_out=-1 ... 0"),
        ("sample.prompts=cup", "sample.prompts=cup ... list"),
        ("sample.width=50", "sample.width=50 ... 16"),
        ("sample.references=[/nowhere.png]", "/nowhere.png"),
        ("preservation.weight=1", "preservation.weight=1 ... preservation.prompts"),
        ("tracker=null", "group"),
        ("~tracker", "tracker=None ... group"),
        ("~memory.checkpointing", "memory.checkpointing"),
        ("device=gpu", "device=gpu ... cuda"),
    ],
)
def test_a_mistyped_value_is_named_with_its_key_and_what_is_accepted(mistake, said):
    message = refusal(mistake)
    assert holds(message, said), message


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("precision=fp8 precision.matmul=fast", "precision.matmul=fast ... auto, fp8"),
        ("precision=fp8 precision.rowwise=some", "precision.rowwise=some ... true ... false"),
        ("precision=fp8 precision.storage=int4", "precision.storage=int4 ... null, fp8, int8, nf4"),
        ("precision=nf4 precision.layers=[linear9]", "precision.layers ... linear9"),
        ("precision=nf4 precision.layers=[]", "precision.layers ... empty"),
        ("precision=nf4 +precision.rowwise=true", "precision.rowwise=True ... precision.storage=nf4"),
        (
            "precision=nf4 memory.cache_transposed_weights=true",
            "memory.cache_transposed_weights=true ... precision.storage=nf4",
        ),
        (
            "precision=fp8 memory.cache_transposed_weights=true precision.backward=bf16",
            "memory.cache_transposed_weights=true ... precision.backward=bf16",
        ),
        (
            "precision=int8 memory.cache_transposed_weights=true precision.matmul=dequantized",
            "memory.cache_transposed_weights=true ... precision.matmul=dequantized",
        ),
        ("precision=int8 precision.matmul=fp8", "precision.matmul='fp8' ... auto, int8, dequantized"),
        ("precision=int8 precision.backward=fp8", "precision.backward='fp8' ... int8, bf16"),
        ("precision=fp8 precision.rotate=true", "precision.rotate=true ... not a setting"),
        ("precision=fp8 +precision.rotate=true", "precision.rotate=true ... precision.storage=fp8 ... precision=int8"),
        ("precision=nf4 +precision.rotate=true", "precision.rotate=True ... precision.storage=nf4"),
        ("precision=int8 +precision.rowwise=true", "precision.rowwise=true ... precision.storage=int8"),
        ("memory.cache_transposed_weights=1", "memory.cache_transposed_weights=1 ... true ... false"),
        ("+precision.backward=bf16", "precision.backward=bf16 ... precision.storage=None"),
        ("precision=nf4 precision.rowwise=true", "precision.rowwise=true ... not a setting"),
        ("precision=half", "precision=half ... auto, bf16, fp32, fp8, int8, nf4"),
        ("precision=int4", "precision=int4 ... did you mean int8"),
    ],
)
def test_a_precision_that_cannot_be_is_refused_before_anything_is_loaded(mistake, said):
    message = refusal(*mistake.split())
    assert holds(message, said), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said():
    assert holds(refusal("device=cuda"), "device=cuda ... GPU ... device=cpu")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("model=foo", "model=foo ... dev, klein_4b"),
        ("model=tinny", "model=tinny ... did you mean tiny?"),
        ("optimizer=foo", "optimizer=foo ... adafactor, adamw, adamw_8bit, lion, muon, prodigy, schedul"),
        ("+experiment=foo", "experiment=foo ... debug, demo, demo_edit, ... relighting, ... tarot"),
    ],
)
def test_an_unknown_choice_is_named_with_the_known_ones(mistake, said):
    assert holds(refusal(mistake), said)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["dataset=folder"], "dataset.path is missing: add dataset.path=..."),
        (["preservation=base"], "add preservation.prompts="),
        (
            ["dataset=folder", "preservation=base"],
            "dataset.path, preservation.prompts are missing: add dataset.path=... preservation.prompts=...",
        ),
    ],
)
def test_settings_without_a_default_are_asked_for_all_at_once(missing, said):
    assert holds(refusal(*missing), said)


@pytest.mark.parametrize(
    ("name", "main", "said"),
    [
        ("train", cache.main, "dataset.path is missing"),
        ("evaluate", evaluate.main, "run is missing: add run=..."),
        ("caption", caption.main, "dataset.path is missing: add dataset.path=..."),
        ("train", plan.main, "dataset.path is missing"),
    ],
)
def test_every_command_asks_for_what_is_missing(run_command, name, main, said):
    assert holds(run_command.refused(*["dataset=folder"] * (name == "train"), task=main, name=name), said)


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        (["dataset=folder", "dataset.path=cats"], True),
        (["dataset.path=cats"], True),
        (["dataset=folder", "dataset.path=cats", "model=tiny"], False),
        (["+experiment=demo", "dataset.path=cats"], False),
        (["steps=3"], False),
    ],
)
def test_a_dataset_without_a_model_is_a_warning_that_a_toy_is_trained(words, warns):
    assert ("NO MODEL WAS CHOSEN" in unchosen_model(VARIANTS["tiny"], words)) == warns
    assert not unchosen_model(VARIANTS["dev"], words)


def test_the_warning_is_shown_before_anything_is_computed(run_command, pictures, tmp_path):
    stops = [f"cache_dir={pictures / '0.png'}", f"output_dir={tmp_path / 'run'}"]
    code, _, err = run_command("dataset=folder", f"dataset.path={pictures}", "device=cpu", *stops)
    assert code == 2
    assert holds(err, "warning: NO MODEL WAS CHOSEN ... model=dev")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [("steps", "steps ... key=value"), ("steps=[1", "steps=[1"), ("sample.width=${foo}", "foo ... sample.width")],
)
def test_what_cannot_be_parsed_or_resolved_is_one_line_too(mistake, said):
    message = refusal(mistake)
    assert holds(message, said), message
    assert "\n" not in message


def test_a_target_that_matches_nothing_is_named_with_the_layers_there_are():
    message = refusal(r"adapter.targets=[attention\.q]")
    assert "adapter.targets" in message
    assert r"attention\\.q" in message
    assert "double_blocks.N.img_attn.qkv" in message


# ------------------------------------------------------------------ the command


def raising(error):
    def task(config):
        raise error

    return task


def test_the_exit_code_says_how_it_ended(run_command):
    assert run_command(task=lambda config: None) == (0, "", "")
    assert run_command(task=raising(ValueError("a\n b"))) == (2, "", "error: a b\n")
    for number in SIGNALS:
        stopped = Interrupted("stopped after step 3; resume with resume=x", number)
        assert run_command(task=raising(stopped)) == (128 + number, "", "stopped after step 3; resume with resume=x\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_training_ends_the_command_at_once_and_says_what_is_kept(run_command, number, monkeypatch):
    before = [signal.getsignal(name) for name in SIGNALS]

    def task(config):
        signal.raise_signal(number)
        raise AssertionError("went on")

    code, out, err = run_command(task=task)
    assert (code, out) == (128 + number, "")
    assert re.fullmatch(rf".*{signal.Signals(number).name}.* cache.*\n", err)
    assert [signal.getsignal(name) for name in SIGNALS] == before
    monkeypatch.setenv("RANK", "1")
    assert run_command(task=task) == (128 + number, "", "")


def test_what_the_system_refuses_is_one_line_and_what_was_saved_is_said_with_it(run_command):
    error = OSError(28, "No space left on device", "/x")
    error.add_note("The state after step 3 is saved in y.")
    message = run_command.refused(task=raising(error))
    assert message == (
        "/x cannot be written (No space left on device). Make room there, or choose another place. "
        "The state after step 3 is saved in y."
    )


def test_of_several_processes_the_first_speaks_but_for_what_is_anothers_own(run_command, monkeypatch):
    def alone(config):
        with name_process_in_errors(1):
            raise ValueError("only here")

    monkeypatch.setenv("RANK", "1")
    assert run_command(task=raising(ValueError("a"))) == (2, "", "")
    assert run_command("stepz=1") == (2, "", "")
    assert run_command(task=alone) == (2, "", "error: only here (process 1)\n")
    monkeypatch.setenv("RANK", "0")
    assert run_command(task=raising(ValueError("a"))) == (2, "", "error: a\n")


def test_what_is_our_own_mistake_keeps_its_traceback(run_command):
    with pytest.raises(AssertionError, match="invariant"):
        run_command(task=raising(AssertionError("invariant")))
    with pytest.raises(ZeroDivisionError):
        run_command(task=lambda config: 1 / 0)


def test_tracebacks_can_be_asked_for(run_command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="stepz"):
        run_command(task=raising(ValueError("stepz")))


def test_memory_that_does_not_suffice_names_what_needs_less(run_command):
    message = run_command.refused(task=raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert "memory.checkpointing=full" in message
    assert "batch_size" in message


@pytest.mark.parametrize("way", ["fork", pytest.param("python", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "words",
    [
        *(["run.py", "stepz=3"], ["cache.py", "stepz=3"], ["plan.py", "stepz=3"], ["evaluate.py", "seedz=[1]"]),
        ["caption.py", "seedz=1"],
        *(
            ["sweep.py", "/nowhere"],
            ["demo.py", "stepz=3"],
            ["demo.py", "-m", "stepz=1,2"],
            ["demo_edit.py", "stepz=3"],
        ),
    ],
    ids=" ".join,
)
def test_each_command_is_an_entry_file_of_its_own(server, words, way):
    """Which a mistake shows, that the command itself names; in a process that has all libraries, and in a new one."""
    file, *given = words
    if way == "python":
        done = execute([sys.executable, f"train/{file}", *given])
        code, said = done.returncode, done.stderr
    else:
        process = server.start(*given, file=f"train/{file}")
        code, said = process.wait(), process.out.read_text()
    assert code == 2
    assert holds(one_message(said), given[-1])


def test_help_lists_the_groups_and_the_settings(run_command):
    code, out, err = run_command("--help")
    assert (code, err) == (0, "")
    assert "optimizer: _common, adafactor, adamw, adamw_8bit" in out
    assert "rank: 16" in out


def test_hydra_does_not_log_what_is_said_in_a_line(run_command):
    code, out, err = run_command("optimizer._target_=torch.optim.Nope", "device=cpu")
    assert code == 2
    assert "Error getting" not in out + err
    assert "Nope" in err
    assert len(err.strip().splitlines()) == 1
