"""Talking to the Hub: who am I, may I write, upload; every failure as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from hf_delta import __version__
from hf_delta.errors import InputError


# Weights of an earlier upload that this one does not have: left there, a model could be loaded with them.
_WEIGHTS = ("model", "adapter_model", "lora/adapter_model")


def check_id(name: str, key: str) -> None:
    """
    Raises:
        `InputError`: it cannot be the id of a repository.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"{key}: {name!r} is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, "
            "without '--' and '..'."
        ) from error


def check_token(token: str | None) -> str:
    """The name of the account that a token belongs to.

    Raises:
        `InputError`: there is no token, the Hub refuses it, it may only read, or the Hub cannot be reached.
    """
    if constants.is_offline_mode():
        raise InputError("push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be pushed: unset it.")
    if not (token or get_token()):
        raise InputError("push_to_hub: there is no token of the Hub: run `hf auth login`, or set HF_TOKEN.")
    with _one_line("push_to_hub"):
        account = _api(token).whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(
            "push_to_hub: the token may only read: make one that may write, and run `hf auth login` with it."
        )
    return account["name"]


def ready_repository(repo: str, *, token: str | None, private: bool | None, revision: str | None) -> str:
    """Make the repository and the branch if they are not there; returns its full id.

    Raises:
        `InputError`: this account may not write there, or the Hub cannot be reached.
    """
    api = _api(token)
    with _one_line(f"push_to_hub to {repo}"):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        # An existing repository of somebody else is no error above.
        api.auth_check(repo, write=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
    return repo


def upload(repo: str, files: dict[str, Path | bytes], *, token: str | None, revision: str | None, message: str) -> str:
    """Upload files in one commit, and delete weights of earlier commits that are not among them; returns its address.

    What is there already is not sent again, so that the same call after a failure goes on where that stopped.

    Raises:
        `InputError`: it failed, and nothing in the repository has changed.
    """
    api = _api(token)
    with _one_line(f"the push to {repo} failed"), _quiet():
        there = api.model_info(repo, revision=revision)
        names = [file.rfilename for file in there.siblings or ()]
        stale = [path for path in names if path not in files and _is_weight(path)]
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        # On top of what was looked at: of two pushes at once, one has to look again.
        commit = api.create_commit(
            repo, operations, commit_message=message, revision=revision, parent_commit=there.sha
        )
        return commit.commit_url


def _is_weight(path: str) -> bool:
    return path.startswith(_WEIGHTS) and path.endswith((".safetensors", ".safetensors.index.json"))


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf_delta", library_version=__version__)


@contextmanager
def _quiet() -> Iterator[None]:
    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What to do about an error of huggingface_hub, which may stand behind another one."""
    chain, seen = error, []
    while chain is not None and chain not in seen:
        seen.append(chain)
        status = getattr(getattr(chain, "response", None), "status_code", None)
        if isinstance(chain, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
            return str(chain).splitlines()[0]
        if status == 401:
            return "the Hub refuses the token (401): run `hf auth login`, or set HF_TOKEN."
        if status == 403:
            return "the token may not write there (403): take one that may write, or another repository."
        if status in (409, 412):
            return f"the repository was changed at the same time ({status}): push again."
        if isinstance(chain, (RepositoryNotFoundError, EntryNotFoundError)):
            return "there is no such repository, or the token may not see it (404)."
        if status is not None and status != 400:
            return f"the Hub answered {status}: try again later."
        if isinstance(chain, HTTPError) and status is None:
            return f"{constants.ENDPOINT} cannot be reached ({type(chain).__name__}: {str(chain).strip()})."
        chain = chain.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines) or type(error).__name__).rstrip(".") + "."
