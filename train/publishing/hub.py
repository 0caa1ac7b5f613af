"""Push a finished adapter to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from data.checks import check_flag
from train.utils.redact import check_no_secret, masked_text

LATER = "python -m train.hub {} --repo-id {}"


@dataclass(frozen=True)
class HubSettings:
    """The group `hub`."""

    push: bool = False  # at the end of the run
    repo_id: str | None = None  # `owner/name`, or a name in the user's account; created if it does not exist
    private: bool = True

    def __post_init__(self) -> None:
        check_flag("hub.push", self.push)
        check_flag("hub.private", self.private)
        check_no_secret("hub.repo_id", self.repo_id)
        if self.repo_id is not None:
            try:
                validate_repo_id(self.repo_id)
            except HFValidationError as error:
                raise ValueError(f"hub.repo_id={self.repo_id!r} is not a valid repository name ({error})") from error
        if self.push and not self.repo_id:
            raise ValueError("hub.push=true: hub.repo_id is missing. Set hub.repo_id=owner/name")

    def check(self, *, trained: bool = False) -> None:
        """Raise ValueError if something is to be pushed and the login may not write to `repo_id`.

        If the adapter is already `trained`, the advice to push later does not apply.
        """
        if not self.push or self.repo_id is None:
            return
        action, later = "pushing", "and push again"
        if not trained:
            action, later = (
                "hub.push=true",
                f"or omit hub.push and push after training: {LATER.format('RUN_FOLDER', self.repo_id)}",
            )
        if constants.is_offline_mode():
            raise ValueError(f"{action} needs the Hub, but HF_HUB_OFFLINE=1 is set. Unset it, {later}")
        api = huggingface_hub.HfApi()
        try:
            me = api.whoami()
        except Exception as error:  # from the Hub, the network, or the HTTP library
            raise ValueError(
                f"{action}: the login failed ({reason(error)}). Run `hf auth login` with a write token, {later}"
            ) from error
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"{action}: the token is read-only. Run `hf auth login` with a write token, {later}")
        owners = [me["name"], *(owner["name"] for owner in me.get("orgs", []))]
        owner, _, name = self.repo_id.rpartition("/")
        if owner and owner.lower() not in map(str.lower, owners):
            raise ValueError(
                f"hub.repo_id={self.repo_id!r} belongs to another account. Choose one of {', '.join(owners)}"
            )
        try:
            existing = api.model_info(f"{owner or me['name']}/{name}")
        except RepositoryNotFoundError:
            return
        except Exception as error:
            raise ValueError(
                f"hub.repo_id={self.repo_id!r} cannot be accessed ({reason(error)}). Check the name, {later}"
            ) from error
        if self.private and not existing.private:
            raise ValueError(
                f"hub.repo_id={self.repo_id!r} exists and is public. Set hub.private=false if that is intended, or "
                "choose another name"
            )


class PushError(OSError):
    """The adapter is not on the Hub, or not all of it."""


def reason(error: Exception) -> str:
    """Return the error as one line without secrets."""
    return masked_text(" ".join(f"{type(error).__name__}: {error}".split()))


def push(run: Path, settings: HubSettings) -> str:
    """Push the adapter of a run folder with its model card to the Hub; return its address.

    Raises ValueError without a finished adapter or repository, or for a damaged file, and PushError if the Hub or the
    network failed.
    """
    from flux2.adapters.checksums import verify  # these imports take seconds, and --help does without
    from flux2.adapters.reading import PEFT_FILE

    folder = run / "adapter"
    if not (folder / PEFT_FILE).exists():
        raise ValueError(
            f"{str(run)!r} holds no finished adapter (adapter/{PEFT_FILE}). Give the folder of a finished run"
        )
    if not settings.repo_id:
        raise ValueError("no repository is set. Give --repo-id owner/name")
    if links := [file.name for file in folder.rglob("*") if file.is_symlink()]:
        raise ValueError(f"{folder} holds a link, {links[0]}, which would publish a file from elsewhere. Remove it")
    for file in sorted(folder.glob("*.safetensors")):
        verify(file)
    api = huggingface_hub.HfApi()
    try:
        repository = api.create_repo(settings.repo_id, private=settings.private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="LoRA for FLUX.2",
            ignore_patterns=[".*", "*.part"],
        )
    except Exception as error:  # from the Hub, the network, or the HTTP library
        raise PushError(f"{folder} was not pushed to {settings.repo_id} ({reason(error)})") from error
    return str(repository)


def push_or_warn(run: Path, settings: HubSettings) -> str:
    """Push the adapter; return a line with its address, or a warning with the command to push it later."""
    try:
        return f"pushed    {push(run, settings)}"
    except (PushError, ValueError) as error:
        later = LATER.format(run, settings.repo_id) + ("" if settings.private else " --public")
        return f"warning: {error}. The adapter is complete; push it later: {later}"


def given_settings(run: Path, repo_id: str | None, private: bool) -> HubSettings:
    """Return the settings of a push. Raises ValueError without `repo_id`, naming the repository of the run, if any.

    It is not taken from the run folder, which may come from someone else: it would choose what is overwritten.
    """
    from train.checkpoints import resume

    if repo_id is None:
        hub = resume.configuration(run).get("hub")
        named = hub.get("repo_id") if isinstance(hub, dict) else None
        hint = f"--repo-id {named}, as in the run's configuration, if it is yours" if named else "--repo-id owner/name"
        raise ValueError(f"--repo-id is missing. Give {hint}")
    return HubSettings(repo_id=repo_id, private=private)
