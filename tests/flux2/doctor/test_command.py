"""flux2.doctor: what it reports is what is there, a wrong number ends it with 1, and no secret is printed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from flux2.doctor import command as doctor
from flux2.doctor.selftest import CHECKS, Finding

ROOT = Path(__file__).resolve().parents[3]


def printed(capsys: pytest.CaptureFixture[str], findings: list[Finding], patch: pytest.MonkeyPatch) -> tuple[int, str]:
    patch.setattr(doctor, "selftest", lambda: iter(findings))
    code = doctor.main([])
    return code, capsys.readouterr().out


def test_the_command_reports_everything_and_passes(tmp_path: Path) -> None:
    secret = "hf_" + "s3cr3t" * 6
    environment = {"HF_TOKEN": secret, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "flux2.doctor"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("Versions", "Devices", "Folders", "Models", "Self-test", torch.__version__, *CHECKS):
        assert words in done.stdout
    assert "a token is set" in done.stdout
    assert secret not in done.stdout
    assert "s3cr3t" not in done.stdout
    assert "WRONG" not in done.stdout


def test_a_wrong_number_is_named_and_ends_it_with_1(capsys, monkeypatch) -> None:
    findings = [Finding("schedule", False, "relative difference 3.0e-01"), Finding("system message", True, "equal")]
    code, text = printed(capsys, findings, monkeypatch)
    assert code == 1
    assert "WRONG relative difference 3.0e-01" in text
    assert "1 comparisons failed" in text


def test_what_could_not_be_compared_is_no_failure(capsys, monkeypatch) -> None:
    code, text = printed(capsys, [Finding("comparison with diffusers", None, "not made")], monkeypatch)
    assert code == 0
    assert "--    not made" in text


def test_without_a_login_it_says_how_to_get_one(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert doctor.hub_state().startswith("no: `hf auth login`")


def test_models_say_which_parts_are_here(monkeypatch) -> None:
    here = {("dev", "transformer"), ("dev", "vae"), *(("klein_4b", part) for part in doctor.PARTS)}
    monkeypatch.setattr(doctor, "is_available", lambda source, part: (source.variant.name, part) in here)
    found = dict(doctor.models())
    assert found["tiny"] == "embedded"
    assert found["dev"] == "present: transformer, vae; missing: text_encoder, tokenizer"
    assert found["klein_4b"] == "complete"
    assert found["klein_9b"] == "not downloaded (black-forest-labs/FLUX.2-klein-9B)"


def test_folders_are_counted_and_a_home_is_not_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    copies = tmp_path / "copies"
    (copies / "sub").mkdir(parents=True)
    (copies / "sub" / "a.safetensors").write_bytes(b"0" * 20_000_000)
    monkeypatch.setenv("FLUX2_CACHE", str(copies))
    found = dict(doctor.folders())
    assert found["quantized copies"].startswith("~/copies: 1 files, 20.0 MB; ")
    assert doctor.size(tmp_path / "nothing") == "does not exist yet"


@pytest.mark.parametrize(("capability", "words"), [((9, 0), ", FP8 products,"), ((8, 6), "no FP8 products")])
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
    assert "139.00 GB of 141.00 GB free" in text
    assert words in text


def test_a_rocm_build_is_refused_in_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert list(doctor.devices()) == [("GPU", "ROCm 6.4: refused, only CUDA is supported; device=cpu works")]
