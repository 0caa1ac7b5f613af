"""flux2.doctor: what it reports is what is there, a wrong number ends it with 1, and no secret is printed."""

import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from process_helpers import run_module

from flux2.doctor import command as doctor
from flux2.doctor.selftest import CHECKS, Finding


def printed(capsys: pytest.CaptureFixture[str], findings: list[Finding], patch: pytest.MonkeyPatch) -> tuple[int, str]:
    patch.setattr(doctor, "selftest", lambda: iter(findings))
    code = doctor.main([])
    return code, capsys.readouterr().out


def test_the_command_reports_everything_and_passes(monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cr3t" * 6)
    assert run_module("flux2.doctor") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in ("Versions", "Devices", "Folders", "Models", "Self-test", torch.__version__, *CHECKS):
        assert words in printed.out
    assert "token" in printed.out
    assert "s3cr3t" not in printed.out
    assert "WRONG" not in printed.out


def test_a_wrong_number_is_named_and_ends_it_with_1(capsys, monkeypatch) -> None:
    findings = [Finding("schedule", False, "relative difference 3.0e-01"), Finding("system message", True, "equal")]
    code, text = printed(capsys, findings, monkeypatch)
    assert code == 1
    assert "WRONG relative difference 3.0e-01" in text


def test_what_could_not_be_compared_is_no_failure(capsys, monkeypatch) -> None:
    code, text = printed(capsys, [Finding("comparison with diffusers", None, "not made")], monkeypatch)
    assert code == 0
    assert "not made" in text
    assert "WRONG" not in text


def test_without_a_login_it_says_how_to_get_one(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "`hf auth login`" in doctor.hub_state()


def test_models_say_which_parts_are_here(monkeypatch) -> None:
    here = {("dev", "transformer"), ("dev", "vae"), *(("klein_4b", part) for part in doctor.PARTS)}
    monkeypatch.setattr(doctor, "is_available", lambda source, part: (source.variant.name, part) in here)
    found = dict(doctor.models())
    assert re.search(r"transformer, vae\b.*text_encoder, tokenizer", found["dev"])
    assert "text_encoder" not in found["klein_4b"]
    assert "black-forest-labs/FLUX.2-klein-9B" in found["klein_9b"]
    assert len({found[name] for name in ("tiny", "dev", "klein_4b", "klein_9b")}) == 4


def test_folders_are_counted_and_a_home_is_not_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    copies = tmp_path / "copies"
    (copies / "sub").mkdir(parents=True)
    (copies / "sub" / "a.safetensors").write_bytes(b"0" * 20_000_000)
    monkeypatch.setenv("FLUX2_CACHE", str(copies))
    found = dict(doctor.folders())
    (copied,) = [text for name, text in found.items() if "copies" in name]
    assert re.match(r"~/copies\b.*\b1 files?\b.*20\.0 MB", copied)
    assert "GB" not in doctor.size(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("capability", "words"),
    [((9, 0), ", FP8 products, INT8 products,"), ((8, 6), "no FP8 products (8.9 and up), INT8"), ((7, 0), "no INT8")],
)
def test_a_gpu_is_described(capability, words, monkeypatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_capability=lambda index: capability,
        get_device_name=lambda index: "NVIDIA H200",
        mem_get_info=lambda index: (139e9, 141e9),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    name, text = next(doctor.devices())
    assert name == "GPU 0"
    assert "NVIDIA H200" in text
    assert "139.00 GB of 141.00 GB" in text
    assert words in text


def test_a_rocm_build_is_refused_in_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    ((name, text),) = doctor.devices()
    assert name == "GPU"
    assert re.search(r"ROCm 6\.4\b.*CUDA\b.*device=cpu", text)
