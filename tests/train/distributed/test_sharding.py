"""A base that is spread over processes trains the adapter as a whole one does. Two real processes, over gloo."""

import json
import re

import pytest
import torch
from adapter_helpers import TYPES, stirred
from sharding_worker import CASES, PRECISIONS, SOURCE, findings, inputs, loss_of
from torch.distributed.tensor import DTensor
from train_helpers import CONF, adapter, compose, execute, free_port, launch, lines, run_training, values

from flux2 import adapters
from flux2.weights.loading import load_transformer
from flux2.weights.sources import model_source
from train.config.instantiate import parse_settings
from train.config.settings import MemorySettings, RunSettings
from train.distributed.sharding import SETTINGS, attach_sharded, launched_to_shard, sharder
from train.plan import main as plan
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def found(folder):
    """What two processes found, one after the other in a list."""
    return findings(folder, "cpu")


@pytest.mark.slow
def test_there_are_two_processes_and_they_wait_for_each_other_for_long(found):
    for one in found:
        assert one["processes"] == 2
        assert one["timeout"] >= 3600


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_a_sharded_base_gives_the_losses_and_gradients_of_a_whole_one(found, case):
    """Of a step whose pictures have another shape in each process, to the bit."""
    for one in found:
        whole, sharded = one[case]["whole"], one[case]["sharded"]
        assert whole["wrapped in"] == "DistributedDataParallel"
        assert sharded["wrapped in"] == "PeftModel"
        assert sharded["losses"] == whole["losses"]
        assert all(map(torch.equal, sharded["gradients"], whole["gradients"]))
        for gradient, expected in zip(sharded["gradients"], one[case]["alone"], strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)
            assert expected.abs().max() > 1e-6
    assert found[0][case]["sharded"]["losses"] != found[1][case]["sharded"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_each_process_holds_half_of_the_base_and_all_of_the_adapter(found, case):
    for rank, one in enumerate(found):
        sharded = one[case]["sharded"]
        assert all(sharded["sharded"].values())
        assert sharded["adapter is plain"]
        assert sharded["held"] == pytest.approx(one[case]["held by one"] / 2, rel=0.01)
        for name, shape in sharded["whole"].items():
            first = -(-shape[0] // 2)
            rows = min(first, shape[0]) if rank == 0 else shape[0] - first
            assert sharded["local"][name] == (rows, *shape[1:]), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_a_block_is_whole_only_while_it_runs(found, case):
    for one in found:
        assert one[case]["sharded"]["most blocks at once"] in (1, 2)  # one more may have arrived
        assert one[case]["sharded"]["blocks at the end"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_while_loading_a_process_holds_its_share_a_block_and_what_is_in_none(found, case):
    for one in found:
        sharded = one[case]["sharded"]
        sizes: dict[str, int] = {}
        for name, size in sharded["numel"].items():
            part = ".".join(name.split(".")[:2]) if "_blocks." in name else "outside"
            sizes[part] = sizes.get(part, 0) + size
        outside = sizes.pop("outside")
        limit = sum(sizes.values()) / 2 + max(sizes.values()) / 2 + outside
        assert sharded["most while loading"] <= limit * 1.001 < one[case]["held by one"]


@pytest.mark.slow
def test_what_a_sharded_model_saved_is_loaded_by_a_whole_one(found, folder):
    """And predicts the same. One process saved it alone, which the other did not wait for."""
    model = load_transformer(model_source("tiny", None, None, None), "cpu")
    adapters.load(model, folder / "adapter")
    with torch.no_grad():
        prediction = model(**inputs(0, 1))
        torch.testing.assert_close(prediction, found[0]["fp32", "full"]["sharded"]["prediction"], atol=1e-5, rtol=1e-5)
        with adapters.adapters_disabled(model):
            assert not torch.allclose(prediction, model(**inputs(0, 1)), atol=1e-2)


@pytest.mark.slow
def test_an_adapter_that_begins_with_the_bases_weights_is_refused(found):
    for one in found:
        assert "adapter=lora" in one["refused"]


@pytest.mark.slow
def test_work_is_shared_between_processes_and_an_error_is_known_to_both(found):
    first, second = (one["map"] for one in found)
    assert first["shared"] == second["shared"] == [(0, 0), (1, 1), (4, 0), (9, 1), (16, 0)]
    assert first["in step"] == second["in step"] == [0, 1, 2]
    assert len(first["calls"]) == len(second["calls"]) == 2  # a forward is one of both
    assert second["failed"] == "KeyError: 'no such picture'"
    assert first["failed"] == "RuntimeError: process 1 failed: KeyError: 'no such picture'"


# ------------------------------------------------------------------ settings


def test_accelerates_fsdp_settings_are_what_is_done_or_refused():
    assert not launched_to_shard({})
    assert not launched_to_shard({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"})
    assert launched_to_shard(FSDP2)
    assert launched_to_shard(FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "SingleBlock, DoubleBlock"})
    wrong = {
        "FSDP_VERSION": "1",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }
    assert wrong.keys() == SETTINGS.keys()
    for name, value in wrong.items():
        with pytest.raises(
            ValueError, match=f"{SETTINGS[name][0]}={value}: .*{SETTINGS[name][0]}={SETTINGS[name][1][0]}"
        ):
            launched_to_shard(FSDP2 | {name: value})
    with pytest.raises(ValueError, match=r"cls_to_wrap=Linear\. .*DoubleBlock and SingleBlock"):
        launched_to_shard(FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Linear"})


def test_one_process_cannot_shard(small, monkeypatch, tmp_path):
    run = load_config(compose(*small("shard=true", f"output_dir={tmp_path / 'run'}")))
    with pytest.raises(ValueError, match=r"shard=true.*--num_processes 2"):
        run_training(run)
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="--num_processes 2"):
        run_training(compose(*small(f"output_dir={tmp_path / 'run'}")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "off"), [("offload_blocks=0.5", "0"), ("offload_activations=true", "false"), ("compile=true", "false")]
)
def test_what_a_sharded_base_cannot_be_together_with_is_refused(small, setting, off):
    key = setting.partition("=")[0]
    with pytest.raises(ValueError, match=rf"memory\.{setting}\b.*memory\.{key}={off}.*shard=false"):
        load_config(compose(*small("shard=true", f"memory.{setting}")))
    MemorySettings("none").check_sharded()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "loha", "lokr", "oft"])
def test_which_adapters_a_sharded_base_takes_is_said_before_anything_is_loaded(small, kind):
    common = ["shard=true", f"adapter={kind}"]
    settings = [word for word in small() if not (kind == "oft" and word.startswith("adapter.rank"))]
    settings += ["adapter.block_size=16"] if kind == "oft" else []
    if kind in ("dora", "pissa"):
        with pytest.raises(ValueError, match=rf"shard=true.*adapter={kind}\b.*adapter=lora.*shard=false"):
            load_config(compose(*settings, *common))
    else:
        assert load_config(compose(*settings, *common)).processes.sharded
    assert load_config(compose(*settings, f"adapter={kind}")).processes.sharded is False


@pytest.fixture
def one_process():
    """A group of this process alone, over which a base can be sharded."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("kind", ["rslora", "loha", "lokr", "oft", "tlora"])
@pytest.mark.filterwarnings("ignore:.*pre_backward")
def test_an_adapter_of_each_other_type_on_a_sharded_base_learns_the_same(one_process, kind, precision):
    """To the bit, in layers of blocks and of others. A plain LoRA does so in two processes, above."""
    make, settings = TYPES[kind]
    found = []
    for ready in (None, sharder(torch.device("cpu"))):
        model = load_transformer(SOURCE, "cpu", PRECISIONS[precision], say=lambda text: None, ready=ready)
        wrapped = attach_sharded(make, model, seed=0, targets="all_linear", **settings)
        assert all(type(parameter) is torch.nn.Parameter for parameter in adapters.adapter_parameters(wrapped))
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters()) is (ready is not None)
        loss = loss_of(stirred(wrapped), precision, inputs(0, 0))
        loss.backward()
        found.append((loss.item(), [parameter.grad for parameter in adapters.adapter_parameters(wrapped)]))
    (whole, gradients), (loss, theirs) = found
    assert loss == whole
    assert all(map(torch.equal, theirs, gradients))


def test_shard_is_true_or_false():
    with pytest.raises(ValueError, match=r"shard='?yes.*true.*false"):
        parse_settings("", {"shard": "yes"}, RunSettings)


@pytest.mark.slow
def test_the_plan_of_a_sharded_run_divides_the_base(run_command):
    def weights(*more):
        code, out, err = run_command("model=klein_4b", "precision=bf16", "batch_size=1", "+card=24", *more, task=plan)
        assert code == 0, err
        rows = dict(re.findall(r"^ +(weights of blocks|gathered weights) +([\d.]+)", out, re.MULTILINE))
        return {key: float(value) for key, value in rows.items()}

    alone = weights()
    four = weights("shard=true", "+processes=4")
    assert four["weights of blocks"] == pytest.approx(alone["weights of blocks"] / 4, rel=0.03)
    assert "gathered weights" not in alone
    assert 0 < four["gathered weights"] < alone["weights of blocks"] / 4
    assert "+processes=4" in run_command.refused("shard=true", task=plan)
    assert "shard=true" in run_command.refused("+processes=4", task=plan)


# ------------------------------------------------------------------ through the command line


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_process_and_is_resumed_by_one(tmp_path):
    """Started with Accelerate's FSDP2 configuration: pictures, validation loss and checkpoints; then not sharded."""
    arguments = [
        *("model=tiny", "model.resolution=64", "dataset=demo", f"cache_dir={tmp_path / 'cache'}", "log_every=1"),
        *("batch_size=2", "sample.steps=1", "sample.prompts=[a red cup,a blue fox,a star]", "sample_every=2"),
        *("validate_every=2", "validation.samples=3", "checkpoint_every=2", "memory.checkpointing=selective"),
        *("preservation=base", "preservation.prompts=[a red cup]", "caption_dropout=0.3", "optimizer.lr=1e-3"),
    ]
    two, one = tmp_path / "two", tmp_path / "one"
    script = launch(*("--config_file", str(CONF / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"))
    script += ["--main_process_port", str(free_port()), "train/run.py"]
    done = execute([*script, *arguments, "steps=2", f"output_dir={two}"], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2" in done.stdout
    share = re.search(r"sharded.* 2 processes .*?([\d.]+) MB .*?([\d.]+) MB", done.stdout)
    assert 0.45 < float(share[1]) / float(share[2]) < 0.55
    accumulated = [*arguments, "gradient_accumulation=2"]
    run_training(compose(*accumulated, "steps=4", f"output_dir={one}"))
    assert values(two) == pytest.approx(values(one)[:2], rel=1e-5)
    assert values(two, "validation_loss") == pytest.approx(values(one, "validation_loss")[:2], rel=1e-5)
    assert (two / "samples" / "step_000000.png").read_bytes() == (one / "samples" / "step_000000.png").read_bytes()
    run_training(compose(*accumulated, "steps=4", f"resume={two}"))
    assert [line["step"] for line in lines(two)] == [0, 1, 2, 3, 4]
    assert values(two) == pytest.approx(values(one), rel=1e-5)
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], tensor, atol=2e-5, rtol=1e-2)
    assert json.loads((two / "checkpoints" / "step_000002" / "state.json").read_text())["images_per_step"] == 4
