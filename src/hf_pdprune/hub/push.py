"""Puts the stages of a pair on the Hub."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..artefact_file import read_json
from ..plan import PLAN_FILE_NAME, PruningPlan
from ..version import __version__
from .load_stages import check_pair, stage_locations
from .model_card import PICTURE_FILE_NAME, RESULTS_FILE_NAME, is_repo_id, licence_in, model_card


logger = logging.getLogger(__name__)

# What a stage checkpoint consists of. Nothing else in the folder is published, least of all anything pickled.
PUBLISHED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
)


def push_stages_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    subfolders: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    collection: bool | str = False,
    token: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> dict[str, RepoUrl]:
    """
    Puts both stages on the Hub: one repo for each (`<repo_id>-prefill`, `<repo_id>-decode`; `<repo_id>-unified` for a
    unified model), so that every tool that takes a repo id can load them, or one repo with a folder for each.
    [`load_stages`] takes `repo_id` for both.

    An upload that was interrupted goes on where it stopped when the same call is made again: what the Hub has is not
    sent twice. Weight files of an earlier push that the stage no longer has are deleted.

    Args:
        folder (`str`): What [`export_stages`] wrote. Results (`results.json`) and a plot of the plan
            (`pruning_plan.png`) beside the stages go into the model cards.
        repo_id (`str`): `name` or `namespace/name`.
        subfolders (`bool`, defaults to `False`): One repo with the folders `prefill` and `decode` (or
            `unified`).
        private (`bool`, *optional*): Whether repos (and the collection) are made private. Default: as the Hub does.
        revision (`str`, *optional*): Branch to push to; it is made if need be.
        commit_message (`str`, *optional*): Message of the commits.
        collection (`bool` or `str`, defaults to `False`): Whether to tie the stages together in a collection; a string
            is its title (default: the name of the pair).
        token (`str`, *optional*): Access token. Default: that of `hf auth login`.
        dataset_name (`str`, *optional*): Id on the Hub of what the stages were distilled on, for the model cards.
        tags (`Sequence[str]`): More tags of the model cards.

    Returns:
        `dict[str, RepoUrl]`: The repo of each checkpoint.

    Raises:
        `FileNotFoundError`: If the folder holds no pair.
        `ValueError`: If the stages are not of one export, or the repo id is not valid.
        `HfHubHTTPError`: What the Hub answers; a `RuntimeError` where it refuses a weight file.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not a folder with stages")
    folder = Path(folder)
    plan, locations = stage_locations(folder)
    check_pair(plan, locations)
    names = {stage: repo_id if subfolders else f"{repo_id}-{stage}" for stage in locations}
    for name in names.values():
        validate_repo_id(name)
    api = HfApi(token=token, library_name="hf_pdprune", library_version=__version__)
    message = commit_message or f"Upload the stages with hf_pdprune {__version__}"
    results = read_json(folder / RESULTS_FILE_NAME) if (folder / RESULTS_FILE_NAME).is_file() else None
    licence = base_licence(plan, Path(next(iter(locations.values())).path), token)
    card_of = partial(
        model_card,
        plan,
        results=results,
        licence=licence,
        picture=_picture(folder),
        dataset_name=dataset_name,
        tags=tags,
    )
    urls: dict[str, RepoUrl] = {}
    for stage, name in names.items():  # all repos before any upload: what is forbidden is found at once
        urls[stage] = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(urls[stage].repo_id, branch=revision, exist_ok=True)
    where = {stage: (url.repo_id, stage if subfolders else "") for stage, url in urls.items()}
    for stage, (repo, subfolder) in where.items():
        logger.info("uploading the %s stage to %s", stage, repo)
        api.upload_folder(
            repo_id=repo,
            folder_path=locations[stage].path,
            path_in_repo=subfolder or None,
            allow_patterns=list(PUBLISHED_FILES),
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            commit_message=message,
            revision=revision,
        )
        card = card_of(stage, repo.split("/")[-1], where=where)
        _upload(api, repo, "/".join(filter(None, (subfolder, "README.md"))), card.encode(), message, revision)
        if _picture(folder):
            path = "/".join(filter(None, (subfolder, PICTURE_FILE_NAME)))
            _upload(api, repo, path, folder / PICTURE_FILE_NAME, message, revision)
    if subfolders:
        (repo,) = {url.repo_id for url in urls.values()}
        card = card_of(None, repo.split("/")[-1], where=where)
        _upload(api, repo, "README.md", card.encode(), message, revision)
        if _picture(folder):
            _upload(api, repo, PICTURE_FILE_NAME, folder / PICTURE_FILE_NAME, message, revision)
        # Last: with it the repo counts as a pair.
        _upload(api, repo, PLAN_FILE_NAME, folder / PLAN_FILE_NAME, message, revision)
    if collection:
        _collect(api, urls, collection if isinstance(collection, str) else repo_id.split("/")[-1], private)
    return urls


def base_licence(plan: PruningPlan, stage_folder: Path, token: str | None) -> str | None:
    """Licence of the dense model: as the stage's card says, or as the card of the dense model on the Hub does."""
    licence = licence_in(stage_folder / "README.md")
    if licence is None and is_repo_id(plan.base_model):
        try:
            licence = ModelCard.load(plan.base_model, token=token).data.get("license")
        except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
            logger.warning("the licence of %s could not be found: %s", plan.base_model, type(error).__name__)
    return licence


def _picture(folder: Path) -> bool:
    return (folder / PICTURE_FILE_NAME).is_file()


def _upload(api: HfApi, repo: str, path: str, content: bytes | Path, message: str, revision: str | None) -> None:
    api.upload_file(
        path_or_fileobj=content, path_in_repo=path, repo_id=repo, commit_message=message, revision=revision
    )


def _collect(api: HfApi, urls: dict[str, RepoUrl], title: str, private: bool | None) -> None:
    namespace = next(iter(urls.values())).repo_id.split("/")[0]
    made = api.create_collection(
        title[:59],
        namespace=namespace,
        description="Prefill and decode stage of one model, pruned by hf_pdprune",
        private=bool(private),
        exists_ok=True,
    )
    for url in dict.fromkeys(urls.values()):
        api.add_collection_item(made.slug, item_id=url.repo_id, item_type="model", exists_ok=True)
