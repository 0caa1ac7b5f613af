"""What several processes do together, in real ones; and the configurations that start them."""

import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from train_helpers import CONF, adapter, compose, draw_picture, execute, launch, lines, run_training, values

from flux2.weights.sources import TINY_FOLDER
from train.distributed import processes
from train.distributed.processes import Processes, ProcessesDiverged, make_accelerator
from train.distributed.sharding import launched_to_shard

pytest_plugins = ("train_helpers",)


# ------------------------------------------------------------------ alone


def test_alone_there_is_nothing_to_share_or_to_exchange():
    alone = Processes(make_accelerator("cpu"))
    assert alone.map(lambda i: i + 1, range(3)) == [1, 2, 3]
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), 3.0)
    assert alone.wrap(model) is model
    alone.average_gradients(model)
    assert (model.weight.grad == 3).all()
    with pytest.raises(KeyError):  # the error itself
        alone.map({}.__getitem__, [1])


@pytest.mark.parametrize(("given", "current"), [("cuda:1", 1), ("cuda", 0), (None, 0)])
def test_a_run_is_on_the_gpu_that_is_named(monkeypatch, given, current):
    """There is none here: what Accelerate is given is looked at."""
    seen = []

    def see(**options):
        seen.append(os.environ.get("ACCELERATE_TORCH_DEVICE"))
        return SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, is_main_process=True)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(processes, "Accelerator", see)
    make_accelerator(given)
    assert seen == [current, "cuda:1" if current else None]
    monkeypatch.setenv("WORLD_SIZE", "2")
    if current:
        with pytest.raises(ValueError, match=r"device=cuda:1 is one GPU, but several .*CUDA_VISIBLE_DEVICES=1,2"):
            make_accelerator(given)


def test_an_error_within_a_forward_of_all_is_one_of_its_own():
    """The others wait in that forward: nothing can be exchanged with them."""
    accelerator = SimpleNamespace(num_processes=2, process_index=1)
    with pytest.raises(ProcessesDiverged, match="KeyError: 7"):
        Processes(accelerator, sharded=True).map({}.__getitem__, [5, 7])


def test_accelerate_does_not_see_that_it_was_launched_for_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert make_accelerator("cpu").distributed_type.value == "NO"  # it would be FSDP, with a plugin of its own
    assert launched_to_shard()


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_the_first_passes_warnings_on(monkeypatch, first):
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: first))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        make_accelerator("cpu")
        warnings.warn("a picture is odd", stacklevel=1)
    assert ["a picture is odd" in str(one.message) for one in heard] == [True] * first


# ------------------------------------------------------------------ configurations for accelerate launch

FILES = {file.stem: file for file in sorted((CONF / "accelerate").glob("*.yaml"))}
GIVEN = {"ddp": ["--num_processes", "4"]}


def started(name, *more, port="0"):
    """What `accelerate launch --config_file` makes of a file: its arguments, and the environment of the processes."""
    words = [
        "--config_file",
        str(FILES[name]),
        *GIVEN.get(name, []),
        *more,
        "--main_process_port",
        port,
        "train/run.py",
    ]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return args, prepare_multi_gpu_env(args)


def test_there_is_a_configuration_for_each_case():
    assert set(FILES) == {"one_gpu", "ddp", "fsdp2", "two_nodes", "cpu_two"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_accelerate_reads_each_configuration_and_leaves_the_precision_to_the_run(name):
    read = load_config_from_file(str(FILES[name]))
    assert read.mixed_precision == "no"
    args, environment = started(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    # with these Accelerate starts a single process
    assert not args.cpu
    assert not read.use_cpu
    assert (args.multi_gpu or args.use_fsdp) == (name != "one_gpu")


def test_the_configurations_start_as_many_processes_as_they_say():
    assert {name: started(name)[0].nproc_per_node for name in FILES} == {
        "one_gpu": "1",
        "ddp": "4",
        "fsdp2": "4",
        "two_nodes": "8",
        "cpu_two": "2",
    }
    assert started("ddp", "--num_processes", "7")[0].nproc_per_node == "7"
    without = launch_command_parser().parse_args(["--config_file", str(FILES["ddp"]), "train/run.py"])
    with pytest.raises(ValueError, match="--num_processes"):
        _validate_launch_command(without)


def test_two_nodes_find_each_other():
    args, _ = started("two_nodes", "--machine_rank", "1", "--main_process_ip", "10.1.2.3", port="29500")
    assert (args.nnodes, args.node_rank, args.rdzv_endpoint) == ("2", 1, "10.1.2.3:29500")
    assert args.rdzv_backend == "static"
    first, _ = started("two_nodes")
    assert (first.node_rank, first.num_processes) == (0, 16)


def test_the_fsdp2_configuration_is_what_train_sharding_does():
    _, environment = started("fsdp2")
    assert environment["FSDP_VERSION"] == "2"
    assert launched_to_shard(environment)
    for name in set(FILES) - {"fsdp2"}:
        assert not launched_to_shard(started(name)[1])


def test_each_configuration_names_its_own_command():
    for name, file in FILES.items():
        quiet = "--quiet " if name == "one_gpu" else ""  # which has an effect on a single process only
        assert f"accelerate launch {quiet}--config_file conf/accelerate/{name}.yaml" in file.read_text()
        assert isinstance(yaml.safe_load(file.read_text()), dict)


# ------------------------------------------------------------------ real processes


def uneven(folder):
    """Seven pictures: four square with a mask, three wide that edit a reference of another shape."""
    rows = []
    for i in range(7):
        wide = i % 2 == 1
        picture = draw_picture(i, (64, 32) if wide else (48, 48)).convert("RGBA")
        alpha = Image.new("L", picture.size, 255)
        alpha.paste(i * 30, (0, 0, picture.width // 2, picture.height))
        picture.putalpha(alpha)
        picture.save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "text": f"a red cup {i}", "references": []}
        if wide:
            draw_picture(100 + i, (32, 48)).save(folder / f"r{i}.png")
            row["references"] = [f"r{i}.png"]
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["configuration", "environment"])
def test_two_processes_are_one_on_uneven_data_and_one_goes_on_where_they_stopped(tmp_path, way):
    """Buckets of several shapes, masks, references, caption and reference dropout, a number of samples that two do not
    divide; more steps than any bucket has pictures."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    arguments = [
        *("model=tiny", f"model.path={TINY_FOLDER}", "model.resolution=48", "dataset=folder", "dataset.mask=alpha"),
        *(f"dataset.path={uneven(pictures)}", f"cache_dir={tmp_path / 'cache'}", "log_every=1", "checkpoint_every=5"),
        *("caption_dropout=0.3", "reference_dropout=0.3", "optimizer.lr=1e-4", "adapter.rank=2", "validate_every=5"),
        *("validation.samples=3", "sample_every=5", "sample.steps=1", "sample.prompts=[a red cup,a blue fox,a star]"),
        *("preservation=base", "preservation.prompts=[a red cup]", "sample.width=64", "sample.height=64"),
    ]
    two, one = tmp_path / "two", tmp_path / "one"
    if way == "configuration":
        script = launch(*("--config_file", str(FILES["cpu_two"]), "--main_process_port", "0", "train/run.py"))
        script.append("device=cpu")
    else:
        script = launch("train/run.py", processes=2)
    cut = ["batch_size=1", "gradient_accumulation=2", f"output_dir={two}", "steps=5"]
    environment = {} if way == "configuration" else {"ACCELERATE_USE_CPU": "true"}
    done = execute([*script, *arguments, *cut], **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2" in done.stdout
    run_training(compose(*arguments, "batch_size=4", "steps=9", f"output_dir={one}"))
    run_training(compose(*arguments, "batch_size=4", "steps=9", f"resume={two}"))
    assert [line["step"] for line in lines(two)] == [line["step"] for line in lines(one)] == list(range(10))
    for key in ("loss", "validation_loss"):
        assert values(two, key) == pytest.approx(values(one, key), rel=1e-5)
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], tensor, atol=2e-5, rtol=1e-2)
    first = [folder / "samples" / "step_000000.png" for folder in (two, one)]
    assert first[0].read_bytes() == first[1].read_bytes()


@pytest.mark.slow
def test_the_demo_runs_in_two_processes_and_goes_on_in_one(tmp_path):
    """As the README and docs/scaling.md say, with few steps."""
    arguments = [
        "+experiment=demo",
        f"cache_dir={tmp_path / 'cache'}",
        *("validate_every=3", "validation.samples=2", "log_every=1", "checkpoint_every=3", "buckets.resolution=64"),
        *("sample.prompts=[a red cup,a star]", "sample.steps=1", "sample.width=64", "sample.height=64"),
    ]
    two = tmp_path / "two"
    script = launch("train/run.py", processes=2)
    cut = ["batch_size=4", "steps=3", f"output_dir={two}"]
    done = execute([*script, *arguments, *cut], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2" in done.stdout
    assert done.stdout.count("trained parameters") == 1
    done = execute([*launch("train/run.py"), *arguments, "batch_size=8", "steps=4", f"resume={two}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 1" in done.stdout
    assert str(two / "checkpoints" / "step_000003") in done.stdout
    assert [line["step"] for line in lines(two)] == [0, 1, 2, 3, 4]
    assert (two / "adapter" / "adapter_model.safetensors").exists()
