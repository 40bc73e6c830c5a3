"""A model with experts on the Hub: its model card, and uploading both."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast, runtime_checkable

from transformers import PreTrainedModel

from loramix.errors import ConfigurationError
from loramix.experts.adapter import Adapter
from loramix.files.hub import HubOptions, find_file
from loramix.formats.card import CARD_NAME, PICTURE_METADATA, PICTURE_NAME, Card, save_card
from loramix.formats.mixture import MixtureCheckpoint


@runtime_checkable
class Evaluated(Protocol):
    """An evaluation: `loramix.evaluation.Evaluation`."""

    def to_dict(self) -> dict[str, Any]:
        """Its figures."""
        ...


@runtime_checkable
class Picture(Protocol):
    """A matplotlib figure, as `loramix.analysis.plots` draws it."""

    def savefig(self, fname: Any, *, format: str, metadata: Mapping[str, str]) -> None:
        """Write the picture."""
        ...


def card_of(
    model: PreTrainedModel,
    content: Adapter | MixtureCheckpoint,
    evaluation: Evaluated | Mapping[str, Any] | None,
    routing: Picture | None,
    repo_id: str | None,
    tags: Sequence[str] = (),
) -> Card:
    """The card of a model that is saved as `content`.

    Raises:
        ConfigurationError: what is not an evaluation, or not a picture.
    """
    figures = evaluation.to_dict() if isinstance(evaluation, Evaluated) else evaluation
    if not isinstance(cast(object, figures), Mapping | None):
        raise ConfigurationError(
            "The evaluation in a card is an Evaluation, or what `loramix eval --json` printed.",
            received=f"evaluation={evaluation!r}",
            remedy="pass what loramix.evaluation.evaluate(model, …) returns",
        )
    if routing is not None and not isinstance(cast(object, routing), Picture):
        raise ConfigurationError(
            "The picture in a card is a matplotlib figure.",
            received=f"routing={routing!r}",
            remedy="draw the record: routing=loramix.analysis.plots.tokens_by_experts(record)",
        )
    picture = None if routing is None else _png(routing)
    return Card(content, type(model).__name__, repo_id, [*(model.model_tags or ()), *tags], figures, picture)


def _png(routing: Picture) -> bytes:
    file = BytesIO()
    routing.savefig(file, format="png", metadata=PICTURE_METADATA)
    return file.getvalue()


def upload(
    model: PreTrainedModel,
    content: Adapter | MixtureCheckpoint,
    repo_id: str,
    folder: Path | None,
    *,
    evaluation: Evaluated | Mapping[str, Any] | None = None,
    routing: Picture | None = None,
    tags: Sequence[str] | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload a model with its card, which goes on from the one in `folder`, or else from the repository's.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as place:
        _bring_card(Path(place), repo_id, folder, HubOptions(token=token, revision=revision))
        model.save_pretrained(place)
        save_card(Path(place), card_of(model, content, evaluation, routing, repo_id, tags or ()))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=place,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _bring_card(place: Path, repo_id: str, folder: Path | None, options: HubOptions) -> None:
    if folder is not None and (folder / CARD_NAME).is_file():
        found = [path for path in (folder / CARD_NAME, folder / PICTURE_NAME) if path.is_file()]
    else:
        found = [path for path in [find_file(f"hf://{repo_id}", CARD_NAME, options)] if path is not None]
    for path in found:
        shutil.copyfile(path, place / path.name)
