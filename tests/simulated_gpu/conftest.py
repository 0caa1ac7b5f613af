"""Tests here run on the simulated device only: `make test-simulated-gpu`. Elsewhere they are not collected."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if "SIMULATED_GPU" in os.environ else ["test_*.py"]
RESULTS = Path(__file__).with_name("results.json")  # written with SIMULATED_GPU_RESULTS=1, for a whole run

if "SIMULATED_GPU" in os.environ:
    from simulated_gpu.simulated import device

    device().simulated_gpu_answer_ones(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write how many tests of which file passed, by the number of simulated devices."""
    if os.environ.get("SIMULATED_GPU_RESULTS") != "1":
        return
    outcomes = {
        outcome: Counter(report.nodeid.split("::")[0] for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["hardware"] = "simulated GPU"
    results["torch"] = torch.__version__
    devices = results.setdefault("devices", {})
    devices[os.environ.get("SIMULATED_GPU_COUNT", "1")] = {
        name: dict(sorted(n.items())) for name, n in outcomes.items()
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
