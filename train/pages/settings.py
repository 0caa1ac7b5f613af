"""The settings of a run as a form: their names, values, choices and comments, read from conf/.

What a form sends becomes the overrides of a command line. Only settings that conf/ has are taken, only choices and
objects that it names, and no interpolation, which could read the environment (`check_word`, `check_composed`).
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flux2.utils.text import join_words
from train.cli.errors import format_error
from train.cli.start import prepare_hydra
from train.config.instantiate import check_own_targets
from train.config.paths import CONFIG
from train.config.run_config import GROUPS
from train.utils.files import short_path
from train.utils.text import in_quotes

LINE = re.compile(r"(?P<indent> *)(?P<key>[\w-]+):(?P<value>.*?)(?:\s+#\s?(?P<comment>.*))?$")
NAME = re.compile(r"[a-z][\w.]*")
KEY = re.compile(r"[a-z]\w*([./][a-z]\w*)*")  # of a setting or a group: no part is `_target_`
INTERPOLATION = re.compile(r"\$\\*\{")  # Hydra reads `$\{` as `${`
FOREIGN = "hydra", "config", "defaults"  # keys that read files or code of one's own
QUOTE = '"'
MISSING = "???"  # a value that has to be given
MOST_CHARACTERS = 20_000  # of a word
PLACES = re.compile(r"(^|[._])(path|folder|dir|init|resume|references|mask)$")  # settings that may name a file
COMPOSING = threading.Lock()  # Hydra keeps what it composes from in one place of the process


class SettingError(ValueError):
    """A setting that cannot be used; `field` is its name, empty if it is not known which it is."""

    def __init__(self, text: str, field: str = "") -> None:
        super().__init__(text)
        self.field = field


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted name, its value as one types it, and the comment beside it in conf/."""

    name: str
    value: str
    comment: str

    @property
    def typed(self) -> str:
        """What its field shows: nothing for null, and for what is still to be given."""
        return "" if self.value in (MISSING, "null") else self.value

    @property
    def when_empty(self) -> str:
        return {MISSING: "needed", "null": "none"}.get(self.value, "")

    @property
    def lines(self) -> list[str] | None:
        """The texts of a list, one a line of a field; None for another value."""
        found = yaml.safe_load(self.value) if self.value.startswith("[") else None
        return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


@cache
def comments(file: Path) -> dict[str, str]:
    """Return the comment of each key of a YAML file of conf/, by dotted name; under "" that of the whole file."""
    found, path, above, last = dict[str, str](), list[tuple[int, str]](), list[str](), ""
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")):
        text = line.strip()
        if text.startswith("#"):
            words = text.lstrip("# ")
            if last and len(line) - len(line.lstrip()) > path[-1][0] + 2:  # goes on beside the key above
                found[last] = f"{found.get(last, '')} {words}".strip()
            else:
                above.append(words)
        elif (parts := LINE.fullmatch(line)) is not None:
            indent = len(parts["indent"])
            path = [*((at, key) for at, key in path if at < indent), (indent, parts["key"])]
            last = ".".join(key for _, key in path)
            own = [*(above if "" in found else []), parts["comment"] or ""]
            if "" not in found:
                found[""] = " ".join(above)
            found[last] = " ".join(filter(None, own))
            above = []
        elif not text and above and "" not in found:
            found[""], above = " ".join(above), []
        elif number and not text:
            above = []
    return found


@cache
def groups() -> dict[str, list[str]]:
    """Return the groups of conf/ that a run chooses from, with their choices; experiment first."""
    found = {"experiment": choices("experiment")}
    for line in yaml.safe_load((CONFIG / "train.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(line, dict) and not next(iter(line)).startswith("override"):
            found[next(iter(line))] = choices(next(iter(line)))
    return found


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG / group).glob("[!_]*.yaml"))


def about(group: str, choice: str) -> str:
    """Return the comment at the head of a choice's file; empty if it has none."""
    file = CONFIG / group / f"{choice}.yaml"
    lines = file.read_text(encoding="utf-8").split("\n") if choice in choices(group) else []
    return "\n".join(line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line)


def check_word(word: str) -> None:
    """Raise SettingError for a word of a command that names anything but settings and choices of conf/.

    A choice such as `tracker=../../x` would be a file of someone else, and files and values may name code to call.
    """
    name = word.lstrip("+~").partition("=")[0]
    if "\0" in word or len(word) > MOST_CHARACTERS:
        raise SettingError(f"{name} has a null character, or more than {MOST_CHARACTERS:,} characters", name)
    try:
        parsed = OverridesParser.create().parse_override(word)
        value = parsed.value()
    except (HydraException, ValueError) as error:
        raise SettingError(format_error(error, [word]), name) from error
    key, package = parsed.key_or_group, parsed.package or ""
    known = KEY.fullmatch(key) and (not package or KEY.fullmatch(package)) and re.split("[./]", key)[0] not in FOREIGN
    if not known or parsed.is_delete() or parsed.is_sweep_override():
        raise SettingError(f"{word!r} is no setting with one value", name)
    if INTERPOLATION.search(word):
        raise SettingError(f"{word!r}: interpolations such as ${{oc.env:HOME}} work in a shell only", name)
    check_value(name, value)
    if (CONFIG / key).is_dir() and value not in choices(key):
        raise SettingError(f"{word} is not one of {', '.join(choices(key))}", name)


def check_value(name: str, value: Any) -> None:
    """Raise SettingError for a value with an interpolation, or with a key that names code, such as `_target_`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if str(key).startswith("_"):
                raise SettingError(f"{name}: {key} is no setting", name)
            check_value(name, item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_value(name, item)
    elif isinstance(value, str) and "${" in value:
        raise SettingError(f"{name}={value!r}: interpolations such as ${{oc.env:HOME}} work in a shell only", name)


def check_composed(config: DictConfig) -> None:
    """Raise SettingError if a configuration would make anything but what conf/ names."""
    composed = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert isinstance(composed, dict)
    for group in GROUPS:
        value = composed.get(group)
        if not isinstance(value, Mapping):
            raise SettingError(f"{group}={value!r} must be a group of settings; see conf/train.yaml", group)
        if "_target_" in value:
            check_own_targets(group, value)
        else:
            check_value(group, value)


def compose(overrides: Sequence[str], *, hydra_too: bool = False) -> DictConfig:
    """Return the composed configuration. Raises SettingError for overrides that cannot be used."""
    for word in overrides:
        check_word(word)
    with COMPOSING:
        GlobalHydra.instance().clear()
        prepare_hydra()
        try:
            with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
                found = hydra.compose("train", list(overrides), return_hydra_config=hydra_too)
            if not hydra_too:
                check_composed(found)
            return found
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise error_of(error, overrides) from error
        finally:
            GlobalHydra.instance().clear()


def chosen_groups(overrides: Sequence[str]) -> dict[str, str]:
    """Return the choice of each group of the configuration that `overrides` compose."""
    found = compose(overrides, hydra_too=True).hydra.runtime.choices
    return {group: str(found[group]) for group in groups() if found.get(group) is not None}


def error_of(error: Exception, overrides: Sequence[str]) -> SettingError:
    """Return an error with the setting that it names, if it names one."""
    text = format_error(error, overrides)
    given = [word.lstrip("+~").partition("=")[0] for word in overrides]
    named = re.match(r"(?:memory\.)?([a-z][\w.]*)\b", text.removeprefix("configuration: "))
    known = [name for name in given if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)]
    field = known[0] if known else named[0] if named is not None and ("." in named[0] or "=" in text) else ""
    return SettingError(text, field)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a composed configuration as one types them, by dotted name, without what Hydra adds."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if str(key).startswith("_") or (not prefix and key == "hydra"):
            continue
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = typed(value)
    return found


def typed(value: Any) -> str:
    """Return a value as one types it into a field: a text as it is, all else as in YAML."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9).removesuffix("...\n").strip()


def settings(overrides: Sequence[str]) -> list[Setting]:
    """Return all settings of the configuration that `overrides`, choices of groups, compose, in the order of conf/."""
    found = flatten(OmegaConf.to_container(compose(overrides), resolve=True))
    chosen = chosen_groups(overrides)
    main, texts = comments(CONFIG / "train.yaml"), dict[str, str]()
    for name in found:
        group, _, rest = name.partition(".")
        files = [CONFIG / group / f"{choice}.yaml" for choice in (chosen.get(group, ""), "_common", "default")]
        own = [comments(file).get(rest, "") for file in files if rest and file.is_file()]
        texts[name] = main.get(name) or next(filter(None, own), "")
    return [Setting(name, value, texts[name]) for name, value in found.items()]


def override(name: str, value: str) -> str:
    """Return the override `name=value`, with Hydra's quotes where the value would be read as something else.

    Raises SettingError for a name that is none, and for an interpolation.
    """
    if not NAME.fullmatch(name) or "_target_" in name or name.partition(".")[0] == "hydra":
        raise SettingError(f"{name!r} is no setting", name)
    if "${" in value:
        raise SettingError(f"{name}={value!r}: interpolations such as ${{oc.env:HOME}} work in a shell only", name)
    word = f"{name}={in_quotes(value, QUOTE)}"
    try:
        if not OverridesParser.create().parse_override(f"{name}={value}").is_sweep_override():
            word = f"{name}={value}"
    except HydraException:
        pass
    check_word(word)
    return word


def override_of_lines(name: str, lines: Sequence[str]) -> str:
    """Return the override of a list of texts. Raises SettingError for a name that is none, and an interpolation."""
    if not NAME.fullmatch(name):
        raise SettingError(f"{name!r} is no setting", name)
    word = f"{name}=[{','.join(in_quotes(line, QUOTE) for line in lines)}]"
    check_word(word)
    return word


def command(overrides: Sequence[str], program: str = "run") -> list[str]:
    """Return the words of the command that trains with `overrides`, or of another `program` of train/."""
    return [sys.executable, str(short_path(CONFIG.parent / "train" / f"{program}.py")), *overrides]


def typed_command(overrides: Sequence[str], program: str = "run") -> str:
    """Return `command` as one types it in a shell."""
    return join_words(["python", *command(overrides, program)[1:]])
