"""The command `flux2` of an installed package: `flux2 train +experiment=style dataset.path=paintings`.

Each word after `flux2` is one of the commands that a checkout has as files, with the same arguments: `flux2 train` is
`python train/run.py`. Nothing is imported before the command is known.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from train.config.paths import CONFIG

ROOT = CONFIG.parent
SHELLS = ("bash", "zsh")


@dataclass(frozen=True)
class Command:
    """A command: its file below train/, or its module, and what it does."""

    target: str
    about: str
    example: str = ""
    composed: bool = False  # takes settings of conf/

    @property
    def script(self) -> Path:
        return ROOT / self.target


GROUPS: dict[str, dict[str, Command]] = {
    "Train": {
        "train": Command("train/run.py", "train a LoRA", "flux2 train +experiment=style dataset.path=paintings", True),
        "plan": Command("train/plan.py", "will it fit, and how long", "flux2 plan +experiment=style +card=12", True),
        "caption": Command(
            "train/caption.py", "write missing captions", "flux2 caption dataset=folder dataset.path=paintings", True
        ),
        "cache": Command("train/cache.py", "fill the cache of latents and embeddings alone", composed=True),
    },
    "Look": {
        "evaluate": Command("train/evaluate.py", "compare checkpoints", "flux2 evaluate run=outputs/style/...", True),
        "sweep": Command("train/sweep.py", "write the table of a sweep", "flux2 sweep outputs/demo/..."),
        "studio": Command("train/studio.py", "all of this as a page in the browser", "flux2 studio ~/pictures"),
    },
    "Use": {
        "generate": Command(
            "flux2.generate", "make images", 'flux2 generate --model klein_4b --prompt "a cup" --adapter outputs/...'
        ),
        "export": Command("flux2.export", "write files for ComfyUI, diffusers and others"),
        "push": Command("train.hub", "push an adapter to the Hugging Face Hub"),
        "serve": Command("flux2.serve", "serve a text encoder to other machines"),
        "doctor": Command("flux2.doctor", "what is installed, what fits, and a self-test"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
COMPLETION = {
    "bash": """\
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
_flux2() {
  local IFS=$'\\n'
  COMPREPLY=($(flux2 complete "${COMP_WORDS[@]:1:COMP_CWORD}"))
  [[ ${COMPREPLY[0]} == *= || -z ${COMPREPLY[0]} ]] && compopt -o nospace
}
complete -o default -F _flux2 flux2
""",
    "zsh": """\
#compdef flux2
_flux2() {
  local -a found
  found=("${(@f)$(flux2 complete "${(@)words[2,CURRENT]}")}")
  compadd -S '' -- $found || _files
}
compdef _flux2 flux2
""",
}


def help_text() -> str:
    """Return what `flux2 --help` prints."""
    lines = ["usage: flux2 COMMAND [...]", "", "Fine-tune FLUX.2 with LoRA on the hardware you have."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        for name, command in commands.items():
            lines.append(f"  {name:<10}{command.about}")
            lines += [f"{'':12}{command.example}"] if command.example else []
    lines += [
        "",
        "`flux2 COMMAND --help` says what a command takes. Settings are key=value; docs and conf/ list them.",
        f"Several GPUs: accelerate launch --num_processes 4 $(flux2 where train) ...; conf/ is {CONFIG}",
        'Completion: source <(flux2 completion bash), or eval "$(flux2 completion zsh)".',
    ]
    return "\n".join(lines)


def completions(words: Sequence[str]) -> list[str]:
    """Return what the last of `words`, those after `flux2`, may become."""
    last, before = words[-1] if words else "", words[:-1]
    if not before:
        return [name for name in (*COMMANDS, "where", "completion") if name.startswith(last)]
    if before[0] not in COMMANDS or not COMMANDS[before[0]].composed:
        return []
    content = yaml.safe_load((CONFIG / "train.yaml").read_text(encoding="utf-8"))
    groups = [next(iter(line)) for line in content["defaults"] if isinstance(line, dict)]
    groups = [group for group in groups if (CONFIG / group).is_dir()]
    key, equals, _ = last.partition("=")
    group = key.removeprefix("+")
    if equals and (key == "+experiment" or group in groups):
        found = [f"{key}={file.stem}" for file in sorted((CONFIG / group).glob("[!_]*.yaml"))]
    else:
        settings = [name for name, value in content.items() if name not in ("defaults", "hydra")]
        found = ["+experiment=", *(f"{name}=" for name in (*groups, *settings))]
    return [text for text in found if text.startswith(last)]


def main() -> int:
    """Run the command that the command line names."""
    words = sys.argv[1:]
    name = words[0] if words else "--help"
    if name in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if name == "complete":
        print("\n".join(completions(words[1:])))
        return 0
    if name == "completion" and words[1:] and words[1] in SHELLS:
        print(COMPLETION[words[1]], end="")
        return 0
    if name == "where" and words[1:] and words[1] in COMMANDS and "/" in COMMANDS[words[1]].target:
        print(COMMANDS[words[1]].script)
        return 0
    if name in ("where", "completion"):
        known = SHELLS if name == "completion" else [one for one in COMMANDS if "/" in COMMANDS[one].target]
        print(f"error: flux2 {' '.join(words)}: write flux2 {name} and one of {', '.join(known)}", file=sys.stderr)
        return 2
    if name not in COMMANDS:
        print(f"error: {name!r} is not one of {', '.join((*COMMANDS, 'where', 'completion'))}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if "/" in command.target:
        sys.argv = [str(command.script), *words[1:]]
        runpy.run_path(str(command.script), run_name="__main__")
    else:
        sys.argv = [f"flux2 {name}", *words[1:]]
        runpy.run_module(command.target, run_name="__main__", alter_sys=True)
    return 0
