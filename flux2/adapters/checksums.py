"""Checksums of saved adapters, and their verification.

The header of each file has the hash of its tensors (as ModelSpec's and as our own entry), that of PEFT's file also the
hash of the configuration next to it. The state file of a checkpoint has checksums of all its files.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from safetensors import safe_open

from flux2.adapters.formats import AdapterError
from flux2.adapters.peft_config import PEFT_CONFIG
from flux2.utils.files import checksum
from flux2.utils.json_files import read_json
from flux2.weights.modelspec import HASH, OWN_HASH, data_hash, header_hash

CONFIG_HASH = "flux2_lora.adapter_config_sha256"
STATE_FILE = "state.json"  # in a checkpoint, next to the adapter's folder; train/checkpoints writes it
STATE_LIMIT = 1 << 20  # bytes of a state file that is read
log = logging.getLogger(__name__)


def config_hash(folder: Path) -> dict[str, str]:
    """Return the entry of the header of PEFT's file in `folder`."""
    return {CONFIG_HASH: hashlib.sha256((folder / PEFT_CONFIG).read_bytes()).hexdigest()}


def verify(file: Path) -> None:
    """Raise AdapterError unless an adapter's file has the checksums that exist for it; OSError if it is unreadable.

    A configuration outside of checkpoints may have been edited on purpose, and many tools that edit a file copy its
    header with ModelSpec's hash, which is then of other tensors: both are warnings.
    """
    with safe_open(file, "pt") as opened:
        about = opened.metadata() or {}
    recorded = header_hash(about, OWN_HASH), header_hash(about, HASH)
    if OWN_HASH in about and recorded[0] is None:
        raise damaged(file, "its header")
    if any(recorded):
        found = data_hash(file)
        if recorded[0] not in (None, found):
            raise damaged(file, "its header")
        if recorded[0] is None and recorded[1] != found:
            log.warning(
                "adapter %s has other tensors than its %s says: a program edited it and kept that, or it is damaged",
                *(file, HASH),
            )
    config = file.parent / PEFT_CONFIG
    if CONFIG_HASH in about and config.exists() and config_hash(file.parent)[CONFIG_HASH] != about[CONFIG_HASH]:
        log.warning("adapter %s was changed since it was saved. Unless you did that, restore it from a copy", config)
    files = recorded_files(file.parent)
    for one in (file, config):
        if one.name in files and one.exists() and checksum(one) != files[one.name]:
            raise damaged(one, f"the checkpoint's {STATE_FILE}")


def damaged(file: Path, where: str) -> AdapterError:
    return AdapterError(
        f"adapter {file} was changed since it was saved: it differs from the checksum in {where}. Restore it from a "
        "copy, or use another checkpoint"
    )


def recorded_files(folder: Path) -> dict[str, str]:
    """Return the checksums that the state file next to an adapter's folder records, by the names of its files."""
    try:
        files = read_json(folder.parent / STATE_FILE, STATE_LIMIT)["files"]
        own = {Path(name).name: entry for name, entry in files.items() if Path(name).parent == Path(folder.name)}
        return {name: str(entry["xxh3_128"]) for name, entry in own.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # there is none, or one of another program or an old version; a run that resumes reports it
