"""train.encoding.text_encoders: training from a text encoder elsewhere, which may be slow, unkind or gone."""

import threading
import time
from pathlib import Path

import helpers
import hydra
import pytest
import torch
from message_helpers import holds
from remote_helpers import SECRET, FakeServer, RealServer, harmful_archive, saved
from safetensors.torch import load_file
from train_helpers import CAPTIONS, Command, compose, run_training, values

from flux2.models.variants import VARIANTS
from flux2.prompts.remote_client import PUBLISHED, TOKEN
from flux2.prompts.remote_protocol import IDENTITY_HEADER
from flux2.weights.sources import TINY_FOLDER, ModelSource
from train.cache import main
from train.encoding import text_encoders
from train.encoding.text_encoders import LocalTextEncoder, RemoteTextEncoder
from train.stages.data import prepare_samples
from train.stages.memory import load_config

pytest_plugins = ("remote_helpers", "train_helpers")
pytestmark = pytest.mark.usefixtures("no_token")

WANTED = {*CAPTIONS, ""}  # what the runs below need an embedding of


def remote(server: FakeServer, *more: str) -> list[str]:
    """The settings that ask `server`, without patience."""
    quick = ["text_encoder.wait=0.01", "text_encoder.timeout=20", "text_encoder.attempts=4"]
    return ["text_encoder=remote", f"text_encoder.url={server.url}", *quick, *more]


def embeddings(cache: Path) -> dict[str, torch.Tensor]:
    """The embeddings in a cache folder by file."""
    found = {file.name: load_file(file) for file in cache.rglob("*.safetensors")}
    return {name: tensors["embeddings"] for name, tensors in found.items() if "embeddings" in tensors}


# ------------------------------------------------------------------ the real server


def tiny(pictures: Path, cache: Path, *more: str) -> list[str]:
    """Two steps of the embedded model."""
    off = ["checkpoint_every=0", "sample_every=0", "validate_every=0", "log_every=1"]
    sizes = ["model=tiny", "model.resolution=48", "batch_size=2", "steps=2", "adapter.rank=4", "device=cpu"]
    return [*sizes, *off, "dataset=folder", f"dataset.path={pictures}", f"cache_dir={cache}", *more]


def test_training_from_the_real_server_is_training_from_this_machine_and_the_token_is_nowhere(
    real_server: RealServer, pictures: Path, tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and cache entries bit for bit; and of the token no trace in what was written and printed."""
    monkeypatch.setenv(TOKEN, SECRET)
    asked = ["text_encoder=remote", f"text_encoder.url={real_server.url}", "tracker=tensorboard"]
    far, near = tmp_path / "far", tmp_path / "near"
    code, out, err = run_command(*tiny(pictures, far / "cache", f"output_dir={far / 'run'}", *asked))
    assert code == 0, err
    run_training(compose(*tiny(pictures, near / "cache", f"output_dir={near / 'run'}")))
    assert len(values(far / "run")) == 2
    assert values(far / "run") == values(near / "run")
    ours = embeddings(near / "cache")
    theirs = embeddings(far / "cache")
    assert len(theirs) == len(WANTED)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)

    said = out + err
    monkeypatch.setenv(TOKEN, f"{SECRET}-of-yesterday")  # an error, and what it prints
    code, out, err = run_command(*tiny(pictures, tmp_path / "none", f"output_dir={tmp_path / 'refused'}", *asked))
    assert code == 2
    assert holds(err, "token ... HTTP 401")
    code, out2, err2 = run_command(*tiny(pictures, tmp_path / "none"), *asked[:2], f"+text_encoder.token={SECRET}")
    assert code == 2
    assert "text_encoder.token=*** is not a setting" in err2
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    assert [str(file) for file in written if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in said + out + err + out2 + err2
    assert real_server.url in (far / "run" / "config.yaml").read_text()


def test_what_the_server_gave_is_what_the_local_encoder_would_not_compute_again(
    real_server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    source = ModelSource(VARIANTS["tiny"], str(TINY_FOLDER))
    far, near = RemoteTextEncoder(real_server.url), LocalTextEncoder()
    assert far.identity(source, torch.bfloat16) == near.identity(source, torch.float32), "the server's dtype counts"
    assert far.identity(source, torch.float32) != near.identity(source, torch.bfloat16)
    assert RemoteTextEncoder(real_server.url, length=9).identity(source, torch.float32) == (
        LocalTextEncoder(9).identity(source, torch.float32)
    )


# ------------------------------------------------------------------ servers that misbehave


@pytest.mark.parametrize("protocol", ["flux2", "published"])
def test_training_goes_on_though_every_third_request_fails_and_the_server_is_slow(
    protocol, fake_server, small, tmp_path
):
    server = fake_server(helpers.VARIANTS["dev"])

    def slow(number, prompts):
        time.sleep(0.05)
        return (503, {}, b"busy") if number % 3 == 0 else None

    server.answer = slow
    more = remote(server, f"text_encoder.protocol={protocol}", "steps=2", f"output_dir={tmp_path / 'run'}")
    run_training(compose(*small(*more, f"cache_dir={tmp_path / 'cache'}")))
    assert len(values(tmp_path / "run")) == 2
    assert sorted(server.given) == sorted(WANTED)
    assert len(server.asked) > len(WANTED)
    stored = embeddings(tmp_path / "cache")
    assert len(stored) == len(WANTED)
    assert all(any(torch.equal(found, server.embedding(text)) for found in stored.values()) for text in WANTED)


def test_a_servers_dtype_may_be_another_than_the_models(fake_server, small, tmp_path):
    """As with the published endpoint, which computes in bfloat16 whatever the model is trained in."""
    server = fake_server(helpers.VARIANTS["dev"])
    server.answer = lambda number, prompts: (200, {}, saved(server.embedding(prompts[0])[None].bfloat16()))
    every = ["steps=2", "sample_every=2", "validate_every=1", "sample.prompts=[a cup]", "sample.steps=1"]
    held = ["preservation=base", "preservation.prompts=[a fox]", f"cache_dir={tmp_path / 'cache'}"]
    more = remote(server, "text_encoder.protocol=published", f"output_dir={tmp_path / 'run'}", *every, *held)
    run_training(compose(*small(*more)))
    assert {tensor.dtype for tensor in embeddings(tmp_path / "cache").values()} == {torch.bfloat16}
    assert len(values(tmp_path / "run")) == 2
    assert len(list((tmp_path / "run" / "samples").iterdir())) >= 2
    assert len(values(tmp_path / "run", "validation_loss")) >= 2


def test_as_many_prompts_are_under_way_as_the_setting_says_each_in_its_own_request(fake_server, small, tmp_path):
    for most in (1, 3):
        server = fake_server(helpers.VARIANTS["dev"])
        together = threading.Barrier(most, timeout=20)

        def wait(number, prompts, together=together, most=most):
            assert len(prompts) == 1
            if number <= 6:  # of seven
                together.wait()
            time.sleep(0.05)

        server.answer = wait
        cache = f"cache_dir={tmp_path / str(most)}"
        prepare_samples(
            load_config(compose(*small(*remote(server, f"text_encoder.max_concurrent_requests={most}"), cache)))
        )
        assert server.most == most
        assert sorted(server.given) == sorted(WANTED)


SHAPE = (1, 64, 48)
ANSWERS = {
    "a wrong shape": (torch.ones(1, 64, 47), "(1, 64, 47) ... (1, 64, 48)"),
    "another dtype": (torch.ones(SHAPE, dtype=torch.float64), "torch.float64"),
    "NaN": (torch.full(SHAPE, float("nan")), "NaN"),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("protocol", ["flux2", "published"])
def test_an_answer_that_is_wrong_stops_the_run_before_training_and_is_not_stored(
    name, protocol, fake_server, small, tmp_path, run_command
):
    import safetensors.torch

    tensor, said = ANSWERS[name]
    server = fake_server(helpers.VARIANTS["dev"])
    body = saved(tensor) if protocol == "published" else safetensors.torch.save({"embeddings": tensor})
    server.answer = lambda *_: (200, {IDENTITY_HEADER: server.identity}, body)
    more = remote(server, f"text_encoder.protocol={protocol}", f"cache_dir={tmp_path / 'cache'}")
    message = run_command.refused(*small(*more, f"output_dir={tmp_path / 'run'}"))
    assert holds(message, f"{server.url} ... {said}")
    assert embeddings(tmp_path / "cache") == {}
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_harmful_pickle_stops_the_run_and_is_not_run(fake_server, small, tmp_path, run_command):
    harm = tmp_path / "harm"
    server = fake_server(helpers.VARIANTS["dev"], answer=lambda *_: (200, {}, harmful_archive(harm)))
    message = run_command.refused(
        *small(*remote(server, "text_encoder.protocol=published"), f"cache_dir={tmp_path / 'cache'}"), task=main
    )
    assert server.url in message
    assert not harm.exists()
    assert embeddings(tmp_path / "cache") == {}


def test_a_server_that_asks_for_a_token_says_where_it_belongs(fake_server, small, tmp_path, run_command, monkeypatch):
    server = fake_server(helpers.VARIANTS["dev"], token=SECRET)
    settings = small(*remote(server), f"cache_dir={tmp_path / 'cache'}")
    message = run_command.refused(*settings, task=main)
    assert holds(message, f"HTTP 401 ... {TOKEN}")
    monkeypatch.setenv(TOKEN, SECRET)
    assert run_command(*settings, task=main)[0] == 0
    assert sorted(server.given) == sorted(WANTED)


def test_a_server_that_dies_in_the_middle_is_told_and_what_it_gave_is_kept(fake_server, small, tmp_path, run_command):
    server = fake_server(helpers.VARIANTS["dev"])

    def die(number, prompts):
        if len(server.given) >= 3:
            raise ConnectionResetError

    server.answer = die
    settings = small(*remote(server, "text_encoder.max_concurrent_requests=2"), f"cache_dir={tmp_path / 'cache'}")
    message = run_command.refused(*settings, task=main)
    assert holds(message, f"{server.url} ... 4 attempts")
    deadline = time.monotonic() + 20
    while len(embeddings(tmp_path / "cache")) < len(server.given) and time.monotonic() < deadline:
        time.sleep(0.02)
    first = list(server.given)
    assert 3 <= len(first) < len(WANTED)
    assert len(embeddings(tmp_path / "cache")) == len(first)

    server.asked.clear()
    server.answer = lambda *_: None
    assert run_command(*settings, task=main)[0] == 0
    assert sorted(server.asked) == sorted(WANTED - set(first)), "only what is missing is asked for"
    server.asked.clear()
    assert run_command(*settings, task=main)[0] == 0
    assert server.asked == []


def test_servers_that_are_not_known_to_be_equal_share_nothing(fake_server, small, tmp_path):
    """Another identity, or an endpoint that tells none, is another encoder; the same identity is the same one."""
    dev = helpers.VARIANTS["dev"]
    first, second = fake_server(dev), fake_server(dev)
    other = fake_server(dev, identity="another")

    def asked(server, *more):
        server.asked.clear()
        prepare_samples(load_config(compose(*small(*remote(server, *more), f"cache_dir={tmp_path / 'cache'}"))))
        return len(server.asked)

    assert asked(first) == len(WANTED)
    assert asked(second) == 0, "says that it is the same"
    assert asked(other) == len(WANTED)
    assert asked(first, "text_encoder.protocol=published") == len(WANTED)
    assert asked(second, "text_encoder.protocol=published") == len(WANTED), "is known by its address alone"
    assert asked(second, "text_encoder.protocol=published") == 0


def test_with_a_full_cache_the_server_need_not_run(fake_server, small, tmp_path, run_command):
    server = fake_server(helpers.VARIANTS["dev"])
    settings = small(*remote(server, "steps=2"), f"cache_dir={tmp_path / 'cache'}")
    assert run_command(*settings, task=main)[0] == 0
    server.stop()
    code, out, err = run_command(*settings, f"output_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert len(values(tmp_path / "run")) == 2
    assert holds(out + err, f"{server.url} ... small_dev ... 64 tokens")
    message = run_command.refused(*settings, "sample.prompts=[a fox]", task=main)
    assert holds(message, f"{server.url} ... 3 attempts")
    message = run_command.refused(*settings, "text_encoder.length=9", task=main)
    assert "Connection refused" in message
    server.start()  # so that it can be stopped again


def test_prompts_that_the_server_cut_are_told(fake_server, small, tmp_path, run_command):
    import safetensors.torch

    server = fake_server(helpers.VARIANTS["dev"])

    def cut(number, prompts):
        body = safetensors.torch.save({"embeddings": server.embedding(prompts[0])[None]})
        headers = {IDENTITY_HEADER: server.identity, "Flux2-Cut": "0" if prompts == [CAPTIONS[1]] else ""}
        return 200, headers, body

    server.answer = cut
    code, out, _ = run_command(*small(*remote(server), f"cache_dir={tmp_path}"), task=main)
    assert code == 0
    assert holds(out, f"64 tokens ... 1 prompt ... {CAPTIONS[1]}")


# ------------------------------------------------------------------ settings


def test_the_published_endpoint_is_the_default():
    encoder = hydra.utils.instantiate(compose("text_encoder=remote").text_encoder)
    assert (encoder.url, encoder.protocol) == (PUBLISHED, None)
    encoder.check(VARIANTS["dev"])


@pytest.mark.parametrize("url", [PUBLISHED, f"{PUBLISHED}/"])
def test_the_endpoint_of_dev_is_not_asked_for_another_model(run_command, tmp_path, url):
    settings = ["model=tiny", "text_encoder=remote", f"text_encoder.url={url}", f"output_dir={tmp_path / 'run'}"]
    message = run_command.refused(*settings)
    assert holds(message, "text_encoder.url= ... model=dev, not of model=tiny ... text_encoder=local ... flux2.serve")
    assert not (tmp_path / "run").exists()
    load_config(compose(*settings[:2], "text_encoder.url=http://127.0.0.1:1"))  # a server of one's own may have it


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "nowhere"}, "text_encoder.url='nowhere' is not an address"),
        ({"url": "https://me:hidden@host"}, "text_encoder.url=https://host/... must have no user, password"),
        ({"protocol": "http"}, "text_encoder.protocol='http' must be one of flux2, published, or null"),
        ({"length": 0}, "text_encoder.length=0 must be an integer from 1"),
        ({"max_concurrent_requests": 0}, "text_encoder.max_concurrent_requests=0 must be an integer from 1 to 64"),
        (
            {"max_concurrent_requests": 65},
            "text_encoder.max_concurrent_requests=65 must be an integer from 1 to 64",
        ),
        ({"timeout": 0}, "text_encoder.timeout=0 must be a number of seconds above 0"),
        ({"timeout": "x"}, "text_encoder.timeout='x' must be a number"),
        ({"wait": -1}, "text_encoder.wait=-1 must be a number of seconds from 0 to 30"),
        ({"attempts": 0}, "text_encoder.attempts=0 must be an integer from 1"),
        ({"attempts": 1.5}, "text_encoder.attempts=1.5 must be an integer"),
    ],
)
def test_a_refused_setting_is_named(settings, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        RemoteTextEncoder(**{"url": "http://127.0.0.1:1", **settings})
    assert str(error.value).startswith(said)
    assert "hidden" not in str(error.value)


def test_nothing_is_loaded_here(fake_server, small, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "load_text_encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    server = fake_server(helpers.VARIANTS["dev"])
    prepare_samples(load_config(compose(*small(*remote(server), f"cache_dir={tmp_path}"))))
    assert sorted(server.given) == sorted(WANTED)
