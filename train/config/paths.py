"""The folder of the configuration files."""

from pathlib import Path

CONFIG = Path(__file__).resolve().parents[2] / "conf"
