"""Push a finished adapter to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from train.utils.redact import masked_text

LATER = "python -m train.hub {}"


@dataclass(frozen=True)
class HubSettings:
    """The group `hub`.

    Attributes:
        push: at the end of the run.
        repo_id: `owner/name`, or a name among the user's own; made if it does not exist.
        private: whether others must not see it.
    """

    push: bool = False
    repo_id: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        for key in ("push", "private"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"hub.{key}={getattr(self, key)!r} must be true or false")
        if self.repo_id is not None:
            try:
                validate_repo_id(self.repo_id)
            except HFValidationError as error:
                raise ValueError(f"hub.repo_id={self.repo_id!r} is no name on the Hub ({error})") from error
        if self.push and not self.repo_id:
            raise ValueError("hub.push=true needs hub.repo_id=owner/name: where the adapter is to go")

    def check(self, *, trained: bool = False) -> None:
        """Whether the login may write there, if anything is to be pushed. Raises ValueError that says what to do.

        Args:
            trained: whether the adapter is there already, so that nothing is gained by pushing it later.
        """
        if not self.push or self.repo_id is None:
            return
        asked = "pushing" if trained else "hub.push=true"
        unless = f"or leave hub.push out and push when it is trained: {LATER.format('RUN_FOLDER')}"
        later = "and push again" if trained else unless
        if constants.is_offline_mode():
            raise ValueError(f"{asked} needs the Hub, and HF_HUB_OFFLINE=1 forbids to ask it: unset it, {later}")
        api = huggingface_hub.HfApi()
        try:
            me = api.whoami()
        except Exception as error:  # of the Hub, the network, or the HTTP library
            raise ValueError(
                f"{asked}: the login does not work ({reason(error)}): run `hf auth login` with a token that may "
                f"write, {later}"
            ) from error
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"{asked}: the token may only read: run `hf auth login` with another, {later}")
        owners = [me["name"], *(owner["name"] for owner in me.get("orgs", []))]
        owner, _, name = self.repo_id.rpartition("/")
        if owner and owner.lower() not in map(str.lower, owners):
            raise ValueError(f"hub.repo_id={self.repo_id!r} is not yours: this login writes to {', '.join(owners)}")
        try:
            there = api.model_info(f"{owner or me['name']}/{name}")
        except RepositoryNotFoundError:
            return
        except Exception as error:
            raise ValueError(f"hub.repo_id={self.repo_id!r} cannot be looked at ({reason(error)}); {later}") from error
        if self.private and not there.private:
            raise ValueError(
                f"hub.repo_id={self.repo_id!r} exists and everybody can see it: give hub.private=false if that is "
                "meant, or another name"
            )


class NotPushed(OSError):  # noqa: N818
    """The adapter is not on the Hub, or not all of it."""


def reason(error: Exception) -> str:
    """What went wrong, in a line and without secrets."""
    return masked_text(" ".join(f"{type(error).__name__}: {error}".split()))


def push(run: Path, settings: HubSettings) -> str:
    """Send the adapter of a run folder with its card to the Hub; returns the address.

    Raises:
        ValueError: there is no finished adapter, or no place to send it to.
        NotPushed: the Hub or the way to it failed.
    """
    from flux2.adapters.files import PEFT_FILE  # these imports take seconds, and --help does without

    folder = run / "adapter"
    if not (folder / PEFT_FILE).exists():
        raise ValueError(f"{str(run)!r} holds no finished adapter (adapter/{PEFT_FILE}): give the folder of a run")
    if not settings.repo_id:
        raise ValueError("where to? Give --repo-id owner/name")
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(settings.repo_id, private=settings.private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="LoRA for FLUX.2",
            ignore_patterns=[".*", "*.part"],
        )
    except Exception as error:  # of the Hub, the network, or the HTTP library
        raise NotPushed(f"{folder} was not pushed to {settings.repo_id} ({reason(error)})") from error
    return str(made)


def push_or_say(run: Path, settings: HubSettings) -> str:
    """`push`; in place of an error, what to do later."""
    try:
        return f"pushed    {push(run, settings)}"
    except (NotPushed, ValueError) as error:
        return f"warning: {error}. Nothing is lost; push it later: {LATER.format(run)}"


def settings_of(run: Path, changes: dict[str, Any]) -> HubSettings:
    """What a run was started with, but for `changes`."""
    from train.checkpoints import resume

    given = resume.configuration(run).get("hub") or {}
    return replace(HubSettings(**given), **{key: value for key, value in changes.items() if value is not None})
