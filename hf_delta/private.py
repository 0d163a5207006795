"""What is nobody's business: paths of a disk, names of a machine, tokens; how to find them, and how to leave them out."""

import getpass
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token


# Keys whose values are secrets or machines, wherever they stand in a recipe.
_KEYS = re.compile(
    r"token|(.*_)?((auth|access|hub|hf|bearer|wandb)_token|use_auth_token|(api|access|auth|private|secret|wandb)_?key)"
    r"|.*(secret|passw|credential).*|(.*_)?(host|hostname|server_base_url|(server|master|group)_(addr|address|port))",
    re.IGNORECASE,
)
_VARIABLES = re.compile(r".*(TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY).*", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
_URL_USER = re.compile(r"(?<=://)[^\s/@]+@")
# Machines of a network of one's own: by a number, by a name without a dot, and as ssh has them.
_URL_HOST = re.compile(r"(https?://)(?:[\w-]+|\d+(?:\.\d+){3})(?=[:/\s]|$)")
_REMOTE = re.compile(r"(?:ssh|sftp|scp)://(?:\S*/)?|[\w.-]+@[\w.-]+:(?:\S*/)?")
_START = r"(?:file://)?(?:~[\w.-]*/|/|[A-Za-z]:[\\/]|\\\\(?=[\w?]))"
# A whole text that is a path, and one inside of a text, whose directories have no spaces.
_PATH = re.compile(rf"{_START}[^\n]*\w[^\n]*[\\/][^\n]*|(?:~[\w.-]*|\.\.?|[A-Za-z]:)[\\/][^\n]+")
_INSIDE = re.compile(r"(?<![\w.~:/<>\\-])(?:file:/+|~[\w.-]*/|/|[A-Za-z]:\\)(?:[^\s\\/:;,'\"()\[\]{}|=<>]+[\\/]+)+")
_SHORTEST = 8  # characters of a secret: a shorter one can stand anywhere


def secrets(*tokens: str | None) -> list[str]:
    """The tokens of this process: given, of `hf auth login`, and whatever variables of the environment are named like one."""
    named = [value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)]
    found = {*tokens, get_token(), *named}
    return sorted(
        (value for value in found if value and len(value) >= _SHORTEST and not os.path.exists(value)), key=len
    )


def machine() -> list[str]:
    """Names of this machine, if nothing else is likely to be called so."""
    names = {socket.gethostname(), os.environ.get("HOSTNAME", "")}
    names |= {name.partition(".")[0] for name in names}
    return sorted(name for name in names if len(name) > 3 and re.search(r"[\d.-]", name) and "localhost" not in name)


def homes() -> list[str]:
    """Home directories of this user, with a slash, here and where systems put them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a number without a name
        user = ""
    usual = [f"/home/{user}/", f"/Users/{user}/", f"C:\\Users\\{user}\\"] if user else []
    return sorted({f"{os.path.expanduser('~')}/", *usual} - {"//", "~/"})


def forms(paths: Iterable[str | Path | None]) -> list[str]:
    """Absolute paths in every form in which they may be written down: as they are, without links, from the shell's directory."""
    found = set()
    for path in filter(None, paths):
        name = os.path.expanduser(str(path))
        found |= {os.path.abspath(name), os.path.realpath(name)}
        if (shell := os.environ.get("PWD")) and not os.path.isabs(name):
            found.add(os.path.normpath(os.path.join(shell, name)))
    return sorted(path for path in found if len(Path(path).parts) > 2)


def shared(value: Any, local: Iterable[str] = (), sentences: bool = True) -> Any:
    """Values of a recipe for others: without keys of secrets and machines; of paths only the names, of texts no tokens.

    Args:
        value: What YAML can hold.
        local (`Iterable[str]`, *optional*): Texts that were paths where the recipe ran, and do not look like one.
        sentences (`bool`, *optional*, defaults to `True`): Whether paths are looked for in the midst of texts as well.
    """
    return _shared(value, set(local), sentences, secrets()[::-1])


def without_secrets(value: Any) -> Any:
    """Values of a recipe without keys of secrets and machines and without tokens in texts; paths stay."""
    return _shared(value, None, False, secrets()[::-1])


def replaced(value: Any, local: Iterable[str] = ()) -> dict[str, str]:
    """The texts among values that [`shared`] changes, and what it makes of them."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    found = {text: new for part in parts for text, new in replaced(part, local).items()}
    if isinstance(value, str) and (new := shared(value, local)) != value:
        found[value] = new
    return found


def _shared(value: Any, *how: Any) -> Any:
    if isinstance(value, dict):
        return {_shared(key, *how): _shared(item, *how) for key, item in value.items() if not _hidden(key)}
    if isinstance(value, (list, tuple)):
        return [_shared(item, *how) for item in value]
    local, sentences, tokens = how
    if not isinstance(value, str):
        return value
    if local is not None and (value in local or _PATH.fullmatch(value)):
        return name_of(value)
    text = _REMOTE.sub("", _URL_USER.sub("", _TOKEN.sub("***", value)))
    text = _URL_HOST.sub(r"\1…", text)
    for token in tokens:
        text = text.replace(token, "***")
    if sentences:
        text = _INSIDE.sub("", text)
    if local is not None:
        for home in homes():
            text = text.replace(home, "")
    return text


def _hidden(key: Any) -> bool:
    return isinstance(key, str) and _KEYS.fullmatch(key) is not None


def name_of(path: Any) -> Any:
    """The last part of a path, of Windows too; what is no text as it is."""
    if not isinstance(path, str):
        return path
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "…"


def holds_token(data: bytes) -> bool:
    """Whether there is a token of the Hub in a file, whoever's it is."""
    return re.search(_TOKEN.pattern.encode(), data) is not None
