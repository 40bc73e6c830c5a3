"""Where a file is: in a local folder, or in a repository on the Hugging Face Hub.

An identifier is one of

    path/to/folder                       a local folder, tried first
    user/repo                            a repository on the Hub; a name without "/" is always a folder
    user/repo@revision                   the same at a branch, tag or commit
    hf://user/repo@revision/subfolder    HfFileSystem's notation: a folder inside the repository

so that every expert of a mixture can name its own revision and subfolder. A revision or subfolder in the identifier
takes precedence over `HubOptions`.

Source: huggingface_hub, `hf_hub_download` and `HfFileSystem.resolve_path`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from loramix.errors import CheckpointNotFoundError, ConfigurationError
from loramix.files import journal

HUB = "https://huggingface.co"
_SCHEME = "hf://"
_REPOSITORY = re.compile(
    r"(?P<repo>[^/@]+(?:/[^/@]+)?)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<subfolder>.+?))?/?"
)
_OWNERLESS = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class HubOptions:
    """How files are fetched from the Hub; for a local folder only `subfolder` has a meaning.

    Args:
        revision: branch, tag or commit; None is the default branch.
        subfolder: folder below the local folder or inside the repository.
        token: access token; True for the stored one, False for none, None for huggingface_hub's default.
        cache_dir: where downloads are kept; None for huggingface_hub's default.
        local_files_only: use the cache only.
        force_download: download files again that are in the cache.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> HubOptions:
        """The options from the keyword arguments of a `from_pretrained`.

        Raises:
            ConfigurationError: an unknown keyword, or a revision or subfolder that is not a text.
        """
        known = [option.name for option in fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise ConfigurationError(
                "Further keyword arguments say how files are fetched.",
                received=", ".join(unknown),
                remedy=f"Use only {', '.join(known)}.",
            )
        options = cls(**kwargs)
        for name in ("revision", "subfolder"):
            value = getattr(options, name)
            if value is not None and not isinstance(value, str):
                raise ConfigurationError(
                    f"{name} is text, or None.", received=f"{name}={value!r}", remedy=f"Write {name} as text."
                )
        return options

    def elsewhere(self) -> HubOptions:
        """The options for another repository: the same token and cache, no revision and no subfolder."""
        return replace(self, revision=None, subfolder=None)

    def below(self, folder: str) -> HubOptions:
        """The options for a subfolder of the present one."""
        return replace(self, subfolder=f"{self.subfolder}/{folder}" if self.subfolder else folder)


def is_local(identifier: str | os.PathLike[str]) -> bool:
    """Whether an identifier is a local folder's: the folder exists, or no repository can have that id."""
    return _folder(identifier) is not None or _looks_local(os.fspath(identifier))


def repository_of(identifier: str) -> str | None:
    """The repository on the Hub that an identifier names; None if it names a folder."""
    match = None if is_local(identifier) else _REPOSITORY.fullmatch(_without_scheme(identifier))
    return None if match is None else match["repo"]


def base_repository_of(identifier: str | None) -> str | None:
    """Likewise of a base model. A name without an owner, such as "gpt2", is one if the Hub's cache has it."""
    from huggingface_hub import try_to_load_from_cache  # pyright: ignore[reportUnknownVariableType]

    if not identifier or _OWNERLESS.fullmatch(identifier) is None:
        return repository_of(identifier) if identifier else None
    cached = _folder(identifier) is None and isinstance(try_to_load_from_cache(identifier, "config.json"), str)
    return identifier if cached else None


def from_anywhere(place: str) -> str:
    """The absolute path of a local folder, so that it stays valid in another working directory; a Hub id as it is."""
    folder = _folder(place)
    return place if folder is None else str(folder.resolve())


def find_file(identifier: str | os.PathLike[str], filename: str, options: HubOptions | None = None) -> Path | None:
    """The path of one file; a file on the Hub is downloaded unless it is in the cache.

    Args:
        identifier: a local folder or a Hub repository, see the module's docstring.
        filename: the file's name inside the folder.
        options: revision, subfolder, token and cache.

    Returns:
        The file's path, or None if the folder or repository exists and has no such file.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or one that cannot be reached.
    """
    return find_any(identifier, (filename,), options)


def find_any(
    identifier: str | os.PathLike[str], filenames: tuple[str, ...], options: HubOptions | None = None
) -> Path | None:
    """The first of several files that exists; otherwise as `find_file`."""
    options = options or HubOptions()
    if not isinstance(cast(object, identifier), str | os.PathLike):
        raise CheckpointNotFoundError(
            "An identifier is a folder or a Hub id.",
            received=f"{identifier!r}, a {type(identifier).__name__}",
            remedy="Give a folder, or a Hub id such as user/repo.",
        )
    folder = _folder(identifier)
    if folder is not None:
        return _find_local(folder, filenames, options)
    text = os.fspath(identifier)
    if not text.strip():
        raise CheckpointNotFoundError(
            "An identifier must not be empty.",
            received=repr(text),
            remedy="Give a folder, or a Hub id such as user/repo.",
        )
    if _looks_local(text):
        raise CheckpointNotFoundError(
            "A local identifier must name an existing folder.",
            received=f"{text!r}, and {_home(Path(text)).absolute()} {_what_is(_home(Path(text)))}",
            remedy=f"Give its folder, {str(Path(text).parent)!r}."
            if os.path.isfile(_home(Path(text)))  # noqa: PTH113 - likewise
            else "Correct the path, or give a Hub id such as user/repo.",
        )
    return _find_on_hub(text, filenames, options)


def names_in(identifier: str | os.PathLike[str], options: HubOptions) -> list[str]:
    """The sorted names of the files and folders at a place; none where there is no such place, or the Hub is not asked.

    It is asked once, and what it answers is only told in messages.
    """
    from huggingface_hub import list_repo_files

    folder = _folder(identifier)
    if folder is not None:
        place = folder / (options.subfolder or "")
        return sorted(os.listdir(place)) if os.access(place, os.R_OK) and place.is_dir() else []  # noqa: PTH208
    text = os.fspath(identifier)
    if options.local_files_only or not text.strip() or _looks_local(text):
        return []
    repo, options = _resolve(text, options)
    above = f"{options.subfolder}/" if options.subfolder else ""
    try:
        files = list_repo_files(repo, revision=options.revision, token=options.token)
    except Exception:  # the files that were looked for were asked for before, with errors of their own
        return []
    return sorted({file.removeprefix(above).partition("/")[0] for file in files if file.startswith(above)})


def _folder(identifier: str | os.PathLike[str]) -> Path | None:
    text = os.fspath(identifier)
    if not text or "\0" in text:
        return None
    path = _home(Path(text))
    return path if os.path.isdir(path) else None  # noqa: PTH112 - also False for a name too long for a file


def _home(path: Path) -> Path:
    """The path with "~" expanded, if there is such a user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _find_local(folder: Path, filenames: tuple[str, ...], options: HubOptions) -> Path | None:
    place = folder / options.subfolder if options.subfolder else folder
    if not place.is_dir():
        raise CheckpointNotFoundError(
            "A subfolder must exist.",
            received=f"subfolder {options.subfolder!r} of {str(folder)!r}, which {_what_is(place)}",
            remedy="Correct subfolder=, or leave it out.",
        )
    found = (journal.current(place / name) for name in filenames)
    return next((path for path in found if path.is_file()), None)


def _looks_local(identifier: str) -> bool:
    if identifier.startswith(_SCHEME):
        return False
    return (
        "/" not in identifier
        or identifier.startswith((".", "~"))
        or Path(identifier).is_absolute()
        or "\\" in identifier
        or "\0" in identifier
        or os.path.exists(identifier)  # noqa: PTH110 - likewise
        or (identifier.count("/") > 1 and "@" not in identifier)
        or _REPOSITORY.fullmatch(identifier) is None
    )


def _what_is(path: Path) -> str:
    if "\0" in str(path):
        return "cannot be a path"
    return "is a file, not a folder" if os.path.exists(path) else "does not exist"  # noqa: PTH110


def _find_on_hub(identifier: str, filenames: tuple[str, ...], options: HubOptions) -> Path | None:
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, options = _resolve(identifier, options)
    unreachable: Exception | None = None
    for name in filenames:
        try:
            return Path(
                hf_hub_download(
                    repo,
                    name,
                    subfolder=options.subfolder,
                    revision=options.revision,
                    token=options.token,
                    cache_dir=options.cache_dir,
                    local_files_only=options.local_files_only,
                    force_download=options.force_download,
                )
            )
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise _translate(error, repo, name, options) from error
    if unreachable is not None:
        raise _translate(unreachable, repo, " or ".join(filenames), options) from unreachable
    return None


def _resolve(identifier: str, options: HubOptions) -> tuple[str, HubOptions]:
    match = _REPOSITORY.fullmatch(_without_scheme(identifier))
    if match is None:
        raise CheckpointNotFoundError(
            "A Hub identifier is user/repo, with @revision and /subfolder after it where needed.",
            received=repr(identifier),
            remedy="Write it as hf://user/repo@revision/subfolder.",
        )
    revision, subfolder = match["revision"], match["subfolder"]
    if revision is not None:
        options = replace(options, revision=revision.replace("%2F", "/"))
    if subfolder is not None:
        options = replace(options, subfolder="/".join(filter(None, (subfolder, options.subfolder))))
    return match["repo"], options


def _without_scheme(identifier: str) -> str:
    return identifier.removeprefix(_SCHEME).removeprefix("models/") if identifier.startswith(_SCHEME) else identifier


def _translate(error: Exception, repo: str, filename: str, options: HubOptions) -> CheckpointNotFoundError:
    """Our error for one of huggingface_hub's; subclasses are tested before their bases."""
    from huggingface_hub import errors

    at = f"{repo!r}" + (f" at revision {options.revision!r}" if options.revision else "")
    name = f"{options.subfolder}/{filename}" if options.subfolder else filename
    if isinstance(error, errors.GatedRepoError):
        return CheckpointNotFoundError(
            "A gated repository needs an account that was granted access.",
            received=f"{at}, which refused {name}",
            remedy=f"Ask for access on the repository's page, then pass token= or run `hf auth login` ({repo}).",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFoundError(
            "A revision must exist in its repository.",
            received=at,
            remedy="Give an existing branch, tag or commit as revision=.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointNotFoundError(
            "An identifier must be a local folder or a repository on the Hub.",
            received=f"{at}, which is neither, or is private",
            remedy="Correct the path or the id; for a private repository pass token= or run `hf auth login`.",
        )
    if isinstance(error, errors.HFValidationError):
        return CheckpointNotFoundError(
            "An identifier must be a local folder or a repository id such as user/repo.",
            received=f"{repo!r}, which is no folder here and cannot be an id on the Hub",
            remedy="Correct the path or the id.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return CheckpointNotFoundError(
            "A file that is not in the local cache needs the Hub.",
            received=f"{name} of {at}, which is no folder here and not in the cache; the Hub was not asked or "
            "did not answer",
            remedy="Correct the path, or connect (without HF_HUB_OFFLINE and local_files_only=True) and try again.",
        )
    return CheckpointNotFoundError(
        "The files of a checkpoint must be available on the Hub.",
        received=f"{name} of {at}: {type(error).__name__}: {error}",
        remedy="See the exception above this one for the answer of the Hub.",
    )
