"""PEFT's configuration of an adapter, its type and scale: `adapter_config.json` of a PEFT folder, or the header of a
file that diffusers wrote.

Neither is trusted: size, depth and numbers are checked, regular expressions that may run for ever and unknown types are
refused by name, and the rest becomes a new configuration with only what the type needs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft

from flux2.utils import checks
from flux2.utils.files import write_text
from flux2.utils.json_files import parse_json
from flux2.utils.text import listed

log = logging.getLogger(__name__)
PEFT_CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"  # key of a file's header under which diffusers writes the configuration
WRAPPERS = re.compile(r"(^\^?|\\?\.)(?:_orig_mod|module)\\?\.")
LIMIT = 1 << 20  # bytes of a configuration
PATTERNS = 4096  # entries of rank_pattern or alpha_pattern
PATTERN_LENGTH = 500
MATCHING = 200_000  # steps that all expressions together may take for one name, but for the length of the name
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|.", re.DOTALL)
TYPES = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT"}  # PEFT's name: ours
# what each type needs of its configuration, in addition to its layers
NEEDED = {
    "LORA": ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    "LOHA": ("r", "alpha", "rank_pattern", "alpha_pattern"),
    "LOKR": ("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"),
    "OFT": ("r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
}


def type_name(config: peft.PeftConfig) -> str:
    """Return the name in docs/adapters.md; a saved PiSSA is a LoRA."""
    if isinstance(config, peft.LoraConfig):
        return "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return TYPES[config.peft_type]


def is_plain(config: peft.PeftConfig) -> bool:
    """Return whether the update is `scale * B A` in every layer."""
    return isinstance(config, peft.LoraConfig) and not config.use_dora


def read_config(place: Path) -> peft.PeftConfig:
    """Return the configuration in the folder `place`. Raises ValueError unless it is complete, valid and supported."""
    if not (place / PEFT_CONFIG).is_file():  # a pipe would block
        raise ValueError(f"{PEFT_CONFIG} is missing")
    try:
        with (place / PEFT_CONFIG).open("rb") as file:
            raw = file.read(LIMIT + 1)
    except OSError as error:
        raise ValueError(f"{PEFT_CONFIG} cannot be read ({error.strerror})") from error
    return parse_config(raw, PEFT_CONFIG)


def read_header(metadata: Mapping[str, str]) -> peft.PeftConfig | None:
    """Return the configuration in the header of a file, None if it has none. Raises ValueError as `read_config`.

    diffusers writes those of all parts of a pipeline into one table, with the name of the part before each key, and
    that of a model alone without.
    """
    if HEADER not in metadata:
        return None
    values = load_table(metadata[HEADER].encode("utf-8", "replace"), HEADER)
    parts = {key.partition(".")[0] for key in values if "." in key}
    if "transformer" in parts:
        values = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("transformer.")}
    elif parts:
        raise ValueError(f"its header is that of an adapter of {', '.join(sorted(parts))}, not of a transformer")
    return config_from(values, HEADER)


def load_table(raw: bytes, where: str) -> dict[str, Any]:
    """Return a JSON table. Raises ValueError, naming `where`, for anything else, and beyond `LIMIT`."""
    if len(raw) > LIMIT:
        raise ValueError(f"{where} is larger than {LIMIT} bytes: it is not the configuration of an adapter")
    try:
        values = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON, or nested too deeply: the file is damaged") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a {type(values).__name__}, not a table of settings")
    return values


def unwrapped(name: str) -> str:
    """Return a name, or a pattern of names, without what compiled and parallel models add: `_orig_mod.`, `module.`."""
    while name != (name := WRAPPERS.sub(r"\1", name)):
        pass
    return name


def parse_config(raw: bytes, where: str) -> peft.PeftConfig:
    return config_from(load_table(raw, where), where)


def config_from(values: dict[str, Any], where: str) -> peft.PeftConfig:
    """Return the configuration of these settings. Raises ValueError, naming `where`, unless valid and supported."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # of other versions of PEFT
            settings = {key: value for key, value in values.items() if key != "runtime_config"}
            for key in ("rank_pattern", "alpha_pattern"):
                if isinstance(pattern := settings.get(key), dict):
                    settings[key] = {unwrapped(name): value for name, value in pattern.items()}
            config = peft.PeftConfig.from_peft_type(**({"peft_type": "LORA"} | settings))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read by PEFT {peft.__version__} ({error!r:.300})") from error
    if config.peft_type not in TYPES:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"its type {kind!s:.50} is not supported; it must be one of {', '.join(TYPES.values())}")
    if isinstance(config, peft.LoraConfig):
        if config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
            raise ValueError(f"its init_lora_weights={config.init_lora_weights!r:.100} changes the base")
        variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
        if used := [name for name in variants if name != "use_dora" and getattr(config, name)]:
            raise ValueError(f"it is a variant of LoRA that is not supported ({', '.join(used)})")
    if replaced := getattr(config, "modules_to_save", None):
        raise ValueError(f"it replaces whole layers in addition to the adapter (modules_to_save={replaced!r:.200})")
    check_numbers(config, where)
    check_keys(config, settings, where)
    return config


def check_keys(config: peft.PeftConfig, settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless `settings` give rank and alpha, for which PEFT has defaults, and switch nothing on that
    this version of PEFT does not know."""
    if missing := [key for key in NEEDED[config.peft_type][:2] if config.peft_type != "OFT" and key not in settings]:
        raise ValueError(
            f"{where} does not give {' and '.join(missing)}, so the adapter's strength is unknown. Restore what PEFT "
            "wrote"
        )
    known = {field.name for field in dataclasses.fields(config)}
    unknown = {key: value for key, value in settings.items() if key not in known}
    if used := [key for key, value in unknown.items() if value is True or (value and isinstance(value, dict | list))]:
        raise ValueError(
            f"{where} has settings that PEFT {peft.__version__} does not know ({listed(used)}), so it may be another "
            "kind of adapter. Install a newer PEFT"
        )
    if others := [key for key, value in unknown.items() if value]:
        log.warning("%s has settings that PEFT %s does not know; they are ignored: %s", where, peft.__version__, others)


def sort_layers(folder: Path) -> None:
    """Sort the layers in a configuration that PEFT wrote, in the order of a set: another one in each process."""
    content = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    write_text(folder / PEFT_CONFIG, json.dumps(content, indent=2, sort_keys=True))


def minimal_config(config: peft.PeftConfig, layers: Sequence[str]) -> peft.PeftConfig:
    """Return a configuration for `layers` with only what its type needs, without patterns of others."""
    needed = {key: getattr(config, key) for key in NEEDED[config.peft_type]}
    alpha = "lora_alpha" if isinstance(config, peft.LoraConfig) else "alpha"
    for key, pattern in (("r", "rank_pattern"), (alpha, "alpha_pattern")):
        if pattern in needed:
            values = {layer: pattern_value(needed[key], needed[pattern], layer) for layer in layers}
            needed[pattern] = {re.escape(layer): value for layer, value in values.items() if value != needed[key]}
    return type(config)(**needed, target_modules=list(layers))


def layer_config(config: peft.PeftConfig, layer: str, name: str) -> peft.PeftConfig:
    """Return a configuration for a single layer `name`, with the rank and alpha that `config` has for `layer`."""
    found: Any = minimal_config(config, [name])
    for key, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        if hasattr(found, pattern):
            setattr(found, key, pattern_value(getattr(config, key), getattr(config, pattern), layer))
            setattr(found, pattern, {})
    return found


def check_numbers(config: Any, where: str) -> None:
    """Raise ValueError, naming `where`, unless ranks are integers >= 1, alphas finite, and patterns safe to use."""
    ranks, alphas = getattr(config, "rank_pattern", {}), getattr(config, "alpha_pattern", {})
    for key, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict):
            raise ValueError(f"{where}: {key}={pattern!r:.200} must map layer names to numbers")
        if len(pattern) > PATTERNS:
            raise ValueError(f"{where}: {key} has {len(pattern)} entries. Give one of at most {PATTERNS}")
        for expression in pattern:
            if problem := pattern_problem(expression):
                raise ValueError(f"{where}: {key} has an invalid pattern {expression[:100]!r} ({problem})")
        if sum(map(matching_steps, pattern)) > MATCHING:
            raise ValueError(
                f"{where}: {key} has regular expressions that may take very long to match, such as "
                f"{max(pattern, key=matching_steps)[:100]!r}. Write whole names of layers instead"
            )
    try:
        if isinstance(config, peft.OFTConfig):
            checks.integer("r", config.r, 0)
            checks.integer("oft_block_size", config.oft_block_size, 0)
            checks.integer("num_cayley_neumann_terms", config.num_cayley_neumann_terms, 1, 100)
            checks.number("eps", config.eps)
            return
        alpha = "lora_alpha" if isinstance(config, peft.LoraConfig) else "alpha"
        for name, rank in {"r": config.r, **ranks}.items():
            checks.integer(name, rank, 1)
        for name, value in {alpha: getattr(config, alpha), **alphas}.items():
            checks.number(name, value)
        for name in ("use_rslora", "use_dora", "decompose_both"):
            if not isinstance(value := getattr(config, name, False), bool):
                raise TypeError(f"{name}={value!r:.100} must be true or false")
        if isinstance(config, peft.LoKrConfig):
            checks.integer("decompose_factor", config.decompose_factor, -1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error!s:.300}") from error


def pattern_problem(expression: str) -> str:
    """Return why a regular expression is not used; empty if it is."""
    if len(expression) > PATTERN_LENGTH:
        return f"it is longer than {PATTERN_LENGTH} characters"
    tokens = TOKEN.findall(expression)
    if any(one == ")" and two in "*+{" for one, two in pairwise(tokens)):
        return "it repeats a group, which may run for ever"
    if any(re.fullmatch(r"\\[1-9]", token) for token in tokens) or ("(", "?") in pairwise(tokens):
        return "it has a reference or a condition"
    try:
        compiled(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return ""


def matching_steps(expression: str) -> int:
    """Return how often a regular expression may backtrack on a name of 50 characters, at most."""
    tokens = TOKEN.findall(expression)
    return 50 ** sum(token in "*+{" for token in tokens) * 2 ** sum(token in "|?" for token in tokens)


@lru_cache(maxsize=2 * PATTERNS)
def compiled(expression: str) -> re.Pattern[str]:
    """Return the expression with which PEFT looks a name up: `expression` is for the end of the name."""
    return re.compile(rf"(.*\.)?({expression})$")


def check_rank(config: peft.LoraConfig, layer: str, rank: int, where: str) -> None:
    """Raise ValueError if `layer` has a `rank` other than that which its scale is computed from."""
    wanted = pattern_value(config.r, config.rank_pattern, layer)
    if rank != wanted:
        raise ValueError(
            f"{layer} has rank {rank} instead of {wanted} in {where}: the tensors and the settings belong to different "
            "adapters"
        )


def pattern_value(default: Any, pattern: Mapping[str, Any], layer: str) -> Any:
    """Return the value for a layer as PEFT looks it up: patterns are regular expressions for the end of its name."""
    return next((value for key, value in pattern.items() if compiled(key).match(layer)), default)


def layer_scale(config: Any, layer: str) -> float:
    """Return alpha / rank of one layer, as PEFT computes it; `layer` is named as in the file."""
    rank = pattern_value(config.r, config.rank_pattern, layer)
    alpha = config.lora_alpha if isinstance(config, peft.LoraConfig) else config.alpha
    return pattern_value(alpha, config.alpha_pattern, layer) / (rank**0.5 if is_rslora(config) else rank)


def is_rslora(config: peft.PeftConfig) -> bool:
    return isinstance(config, peft.LoraConfig) and config.use_rslora
