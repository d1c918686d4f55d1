"""A model on Hugging Face's hub by its id, OWNER/NAME or OWNER/NAME@REVISION: its files are downloaded and checked.

They lie in the hub's own cache (HF_HOME), which other programs share. A download that was interrupted resumes: files
that are complete stay, and a connection that breaks continues within a file. Nothing that is downloaded is run.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bc2_jax.files import file_sha256
from bc2_jax.validation import require_local

_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
# The first kind that the model has is taken.
_WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)  # fmt: skip
_FILES_AT_ONCE = 4


def local_model(path: str | Path) -> Path:
    """The folder of a model: `path` itself, or where the files of the hub's model of that id lie on this machine.

    A local path goes first, also one that does not exist but whose first folder does. What is not in the cache is
    downloaded; before, the licence that the model card states and the size are printed. Without a connection the
    cached files are taken. Raises FileNotFoundError or ValueError, in one sentence, for a model that is not there, that
    needs the consent of its owners, or whose files are not what the hub says they are.
    """
    require_local("the model", str(path))
    match = _ID.fullmatch(str(path))
    if match is None or os.path.exists(path) or os.path.exists(match[1]):
        return Path(path)
    return _fetch(str(path), f"{match[1]}/{match[2]}", match[3])


@functools.cache  # programs ask for the model, its tokenizer and its settings
def _fetch(given: str, name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise FileNotFoundError(
            f"{given} does not exist here; as a model on Hugging Face's hub it needs pip install 'bc2_jax[hub]'."
        ) from error
    lost = f"{given} does not exist here, and "
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{given} is on the hub, but its owners ask for consent first: agree on {_page(name)}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{lost}the hub's model {name} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{lost}the hub has no public model {name}; a private one needs HF_TOKEN.") from error
    except (errors.HTTPError, OSError) as error:  # no connection, or HF_HUB_OFFLINE
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise FileNotFoundError(f"{lost}the hub cannot be asked for the model {name} ({reason}).") from error
    return _download(given, name, revision, info)


def _download(given: str, name: str, revision: str | None, info: Any) -> Path:
    from huggingface_hub import errors, try_to_load_from_cache

    files = _choose(given, {file.rfilename: file for file in info.siblings})
    missing = [
        file for file in files if not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
    ]
    if missing:
        sizes = [sum(file.size or 0 for file in some) / 1e9 for some in (missing, files)]
        print(
            f"{name}: licence {_licence(info)}; downloading {len(missing)} of {len(files)} files, {sizes[0]:.2f} of "
            f"{sizes[1]:.2f} GB, revision {info.sha[:12]}",
            file=sys.stderr,
        )
    try:
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            places = list(pool.map(lambda file: _download_file(name, revision, info.sha, file, file in missing), files))
    except (errors.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"{given} could not be downloaded ({reason}); the same command again resumes, with the files that are "
            "complete."
        ) from error
    return places[0].parent


def _download_file(name: str, revision: str | None, commit: str, file: Any, is_new: bool) -> Path:
    """Where a file is; checked if it is new."""
    from huggingface_hub import HfApi

    # By its branch, not by the commit: so that the branch is found in the cache without a connection.
    place = Path(HfApi().hf_hub_download(name, file.rfilename, revision=revision))
    if place.parent.name != commit:
        raise ValueError(f"{name} was changed while it was downloaded: run the same command again.")
    if is_new and (found := _digest(place, file)) is not None:
        place.resolve().unlink()
        place.unlink(missing_ok=True)
        raise ValueError(
            f"{file.rfilename} of {name} was not taken: its checksum is {found[:16]}..., not the one that the hub "
            "states; run the same command to download it again."
        )
    return place


def _digest(place: Path, file: Any) -> str | None:
    """The checksum of a file if it is not the one that the hub states; that of Git for files that are not large."""
    if file.lfs is not None:
        found = file_sha256(place)
        return None if found == file.lfs.sha256 else found
    content = place.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return None if file.blob_id in (None, git) else git


def _choose(given: str, files: dict[str, Any]) -> list[Any]:
    """config.json, then what else is needed: weights in one format, the tokenizer, settings; no code."""
    if "config.json" not in files:
        raise ValueError(f"{given} is not a model: on the hub it has no config.json.")
    for pattern, index in _WEIGHTS:
        if weights := sorted(fnmatch.filter(files, pattern)):
            return [files[name] for name in (*_BESIDE_WEIGHTS, *weights, index) if name in files]
    raise ValueError(f"{given} has neither model*.safetensors nor pytorch_model*.bin on the hub.")


def _licence(info: Any) -> str:
    """What the model card states."""
    card = info.card_data
    if card is None or not card.get("license"):
        return f"not stated (see {_page(info.id)})"
    link = card.get("license_link")
    return f"{card.get('license_name') or card['license']}" + (f" ({link})" if link else f" ({_page(info.id)})")


def _page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"
