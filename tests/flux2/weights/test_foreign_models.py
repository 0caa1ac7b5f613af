"""A model from someone else: a header, index, configuration or chat template that no model has is one error, soon."""

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flux2.models.text_encoder import TEMPLATE_MEMORY, build, chat, load_tokenizer, tokenize, without_directives
from flux2.models.variants import VARIANTS
from flux2.weights.loading import load_text_encoder
from flux2.weights.safetensors_files import TensorFiles, part_files
from flux2.weights.sources import TINY_FOLDER, Fingerprints, ModelSource, WeightsError

LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "content",
    [
        "[" * 99_999,
        '{"a":' * 99_999,
        "[]",
        "null",
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": "x"}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        f'{{"weight_map": 1{"0" * 9999}}}',
        "\x00",
    ],
)
def test_an_index_that_is_none_is_one_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(content)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"index\.json is not an index of shards"):
        part_files(tmp_path)


def raw(header: str | bytes) -> bytes:
    content = header.encode() if isinstance(header, str) else header
    return len(content).to_bytes(8, "little") + content + bytes(4)


def entry(**changes: Any) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes})


@pytest.mark.parametrize(
    "header",
    [
        "[" * 99_999,
        '{"a":' * 99_999,
        entry(dtype=["F32"]),
        entry(dtype={"F32": 1}),
        entry(dtype=None),
        entry(shape=[True]),
        entry(shape=[1.0]),
        entry(shape=[1] * 9),
        entry(shape=[10**300] * 8),
        entry(shape={"1": 2}),
        entry(data_offsets=[0, 10**400]),
        entry(data_offsets=[False, 4]),
        entry(data_offsets="04"),
        json.dumps({"__metadata__": {"format": {"a": "b"}}, **json.loads(entry())}),
        json.dumps({"__metadata__": ["a"], **json.loads(entry())}),
        b"\xff\xfe{",
    ],
)
def test_a_header_that_is_none_is_one_error(tmp_path: Path, header: str | bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw(header))
    with pytest.raises(WeightsError, match=r"a\.safetensors"):
        TensorFiles([file])


def test_the_name_that_is_there_twice_is_found_soon(tmp_path: Path) -> None:
    names = [f"tensor_{i}" for i in range(60_000)]
    header = "{" + ",".join(f'"{name}": {{}}' for name in [*names, names[-1]]) + "}"
    (tmp_path / "a.safetensors").write_bytes(raw(header))
    before = time.monotonic()
    with pytest.raises(WeightsError, match=r"'tensor_59999' twice"):
        TensorFiles([tmp_path / "a.safetensors"])
    assert time.monotonic() - before < 5


def test_fingerprints_that_are_none_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "fingerprints.json"
    for content in ("[" * 99_999, "[]", "3", "\x00", "{"):
        file.write_text(content)
        with caplog.at_level(logging.WARNING):
            assert Fingerprints(file).get("a") is None
        assert "fingerprints.json cannot be read" in caplog.text
        caplog.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model's text encoder and tokenizer, to be changed."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY_FOLDER / part, tmp_path / part)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        "[" * 99_999,
        "[]",
        "{}",
        "null",
        {"hidden_size": "x"},
        {"hidden_size": []},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"vocab_size": -4},
        {"layer_types": 3},
        {"rope_scaling": [1]},
        {"hidden_act": "os.system"},
        {"text_config": 3},
    ],
)
def test_a_configuration_that_is_none_is_one_error(folder: Path, change: Any) -> None:
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    if isinstance(change, dict) and "text_config" in config and "text_config" not in change:
        change = {"text_config": config["text_config"] | change}
    file.write_text(change if isinstance(change, str) else json.dumps(config | change))
    with pytest.raises(WeightsError, match=str(folder)):
        load_text_encoder(ModelSource(VARIANTS["tiny"], str(folder)), dtype=torch.float32)


def test_a_configuration_cannot_name_code_to_load() -> None:
    config = json.loads((TINY_FOLDER / "text_encoder" / "config.json").read_text())
    named = {
        "_attn_implementation": "someone/kernels",
        "attn_implementation": "someone/kernels",
        "auto_map": {"a": "b"},
    }
    changed = config | named | ({"text_config": config["text_config"] | named} if "text_config" in config else {})
    assert not set(named) & set(without_directives(changed))
    with torch.device("meta"):
        model = build(changed, VARIANTS["tiny"].text)
    assert model.config._attn_implementation in ("sdpa", "eager")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}" + LOOP,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for m in messages %}" + LOOP + "{% endfor %}",
    ],
)
def test_a_template_that_loops_is_an_error(template: str) -> None:
    tokenizer = load_tokenizer(TINY_FOLDER / "tokenizer")
    published = tokenizer.chat_template
    before, tracing = time.monotonic(), sys.gettrace()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template"):
        tokenize(tokenizer, ["a cup"], "mistral", 8)
    assert time.monotonic() - before < 10
    assert sys.gettrace() is tracing
    tokenizer.chat_template = published
    assert tokenizer.apply_chat_template(chat("a cup " * 999, "mistral"), tokenize=False).count("a cup") == 999
    assert tokenize(tokenizer, ["a cup " * 999] * 9, "mistral", 8)[0].shape == (9, 8)


DOUBLE = (
    "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x|length }}"
)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ messages[0].role * 10**10 }}",
        "{{ ([messages] * 10**10)|length }}",
        "{{ 'x'|center(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ '{:>10000000000}'.format('x') }}",
        "{{ {'a': 1}|tojson(indent=10**10) }}",
        "{{ 'a\nb'|indent(10**10) }}",
        "{{ (1).to_bytes(10**10) }}",
        DOUBLE.replace("STEP", "ns.x + ns.x"),
        DOUBLE.replace("STEP", "ns.x ~ ns.x"),
        DOUBLE.replace("STEP", "ns.x.replace('x', 'xx')"),
        DOUBLE.replace("STEP", "[ns.x, ns.x]").replace("ns.x|length", "ns.x|string|length"),
        DOUBLE.replace("{% set ns.x = STEP %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        "{% macro f(n) %}{% set y = f(n - 1) if n else 'xxxxxxxx' %}{{ y }}{{ y }}{% endmacro %}{{ f(60) }}",
        "{{ []|slice(10**10)|list|length }}",
        "{{ messages|slice(10**10)|list|length }}",
        "{{ lipsum(n=10**7, html=false) }}",
    ],
)
def test_a_template_that_takes_all_memory_is_an_error_and_the_limit_ends_with_it(template: str) -> None:
    import resource

    tokenizer = load_tokenizer(TINY_FOLDER / "tokenizer")
    tokenizer.chat_template = template
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"the chat template of the tokenizer (takes too much memory|does not end)"):
        tokenize(tokenizer, ["a cup"], "mistral", 8)
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1.1 * 2**20  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytes(2 * TEMPLATE_MEMORY)) == 2 * TEMPLATE_MEMORY, "nothing of the limit is left"


def test_filters_that_loop_without_a_line_of_the_template_are_an_error() -> None:
    tokenizer = load_tokenizer(TINY_FOLDER / "tokenizer")
    tokenizer.chat_template = "{{ messages|slice(10**12)|select('none')|first }}"
    with pytest.raises(ValueError, match="chat template of the tokenizer does not end"):
        tokenize(tokenizer, ["a cup"], "mistral", 8)
