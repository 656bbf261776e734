"""Data sets of the Hugging Face hub as sources: the `datasets` library fetches one, once, as Parquet files.

A source is named datasets:NAME, datasets:NAME:CONFIG or datasets:NAME:CONFIG:SPLIT; the split is `train` by default.
The files go to the folder or URI in the environment variable ARMD_DATASETS, which all machines of a cluster must reach,
by default ~/.cache/armd/datasets; what is there is used without asking the hub again.
"""

import importlib.util
import os
import re
from dataclasses import replace

from pipelines import storage
from pipelines.errors import UserError

PREFIX = "datasets:"
FOLDER_VARIABLE = "ARMD_DATASETS"
_MARK = "fetched.json"


def files(source: str) -> list[storage.Entry]:
    """The Parquet files of the split that `source` names, fetched where they are not here yet.

    Raises:
        UserError: the library is not installed, the hub cannot be reached, or it has no such data set or split.
    """
    name, _, rest = source.removeprefix(PREFIX).partition(":")
    config, _, split = rest.partition(":")
    folder = _folder(name, config)
    try:
        version = storage.read_json(storage.join(folder, _MARK))["version"]
    except (FileNotFoundError, NotADirectoryError):
        version = _fetch(name, config, folder)
    pattern = re.compile(rf"-{re.escape(split or 'train')}(-\d+-of-\d+)?\.parquet$")
    found = [replace(entry, version=version) for entry in storage.find(folder) if pattern.search(entry.name)]
    if not found:
        splits = sorted(set(re.findall(r"-([^-]+?)(?:-\d+-of-\d+)?\.parquet", " ".join(storage.list_names(folder)))))
        raise UserError(
            f"the data set {name} has no split {split or 'train'!r}, only {', '.join(splits)}",
            "name one: datasets:NAME:CONFIG:SPLIT, where CONFIG may be empty",
        )
    return found


def _folder(name: str, config: str) -> str:
    root = os.environ.get(FOLDER_VARIABLE) or os.path.join("~", ".cache", "armd", "datasets")
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-60:]
    return storage.join(root, f"{readable}-{storage.sha256_bytes(f'{name}:{config}'.encode())[:8]}")


def _fetch(name: str, config: str, folder: str) -> str:
    """Fetch all splits into `folder`; returns what stands for the content, which is recorded last."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{PREFIX}{name} needs the `datasets` library, which is not installed",
            "pip install 'armd[datasets]', or give the data set's files as sources",
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        builder.download_and_prepare(folder, file_format="parquet")
    except Exception as error:  # of the network, the hub, the data set's files: each library has its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            storage.redacted(f"the data set {name} cannot be fetched from the Hugging Face hub: {reason}"),
            "check the name and that huggingface.co can be reached (HF_ENDPOINT names a mirror, HF_TOKEN opens gated "
            "ones); or fetch its .parquet files elsewhere and give their folder as a source",
        ) from None
    version = str(builder.hash)
    storage.write_json(storage.join(folder, _MARK), {"version": version, "name": name, "config": config})
    return version
