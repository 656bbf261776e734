"""Which documents of a corpus have the text of another one: a first pass over the units, by hashes of the texts.

A hash has 128 bits; the driver needs about 35 bytes a document, 9 GB for the 250 million documents of a terabyte.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.corpus_config import Reading
from pipelines.documents import Documents
from pipelines.shard_file import packed_counts
from pipelines.sources import Unit

FOLDER = "hashes"
_SHARE_BITS = 4  # the hashes are sorted in so many shares, as sorting takes several times the memory


def hash_unit(unit: Unit, output_dir: str, reading: Reading) -> dict[str, Any]:
    """Hash the unit's documents into a file of the output folder; what an earlier run finished there is kept.

    Returns:
        {"path": the file, relative to `output_dir`}: a .npy of (documents, 2) uint64.
    """
    identity = {
        "files": [file.identity for file in unit.files],
        "reading": asdict(reading),
        "validation_fraction": unit.validation_fraction,  # a file of either list of sources may be named alike
    }
    path = f"{FOLDER}/{storage.sha256_bytes(json.dumps(identity, sort_keys=True).encode())[:32]}.npy"
    uri = storage.join(output_dir, path)
    if not storage.exists(uri):
        hashes = b"".join(hashlib.sha256(text.encode("utf-8")).digest()[:16] for text in Documents(unit, reading))
        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(hashes, dtype="<u8").reshape(-1, 2))
        storage.write_bytes(uri, buffer.getvalue())
    return {"path": path}


def without_duplicates(units: Sequence[Unit], output_dir: str, paths: Sequence[str]) -> list[Unit]:
    """The units with the numbers of the documents to leave out, and with how many documents were hashed.

    Of equal texts the first one in the order of the plan stays, a held-out one before one that is trained on.

    Args:
        units: all units, in order.
        output_dir: the stage's folder.
        paths: where `hash_unit` put each one's hashes.
    """
    hashes = [np.load(io.BytesIO(storage.read_bytes(storage.join(output_dir, path)))) for path in paths]
    order = sorted(range(len(units)), key=lambda index: units[index].validation_fraction < 1)
    repeated = later_copies([hashes[index] for index in order])
    dropped = dict(zip(order, repeated, strict=True))
    return [
        replace(unit, dropped=_packed(dropped[index]), n_hashed=len(hashes[index])) for index, unit in enumerate(units)
    ]


def _packed(places: np.ndarray) -> str:
    return packed_counts(places) if len(places) else ""


def later_copies(hashes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each of one or more arrays of hashes, (n, 2) uint64, the places that repeat a hash of it or of an earlier.

    Ascending; the first place that holds a hash is not among them.
    """
    everything = np.concatenate(hashes)
    shares = (everything[:, 0] >> np.uint64(64 - _SHARE_BITS)).astype(np.uint8)
    found = []
    for share in range(1 << _SHARE_BITS):
        places = np.flatnonzero(shares == share)
        some = everything[places]
        order = np.lexsort((some[:, 1], some[:, 0]))  # stable: equal hashes stay in the order of the plan
        some = some[order]
        found.append(places[order[1:][(some[1:] == some[:-1]).all(axis=1)]])
    again = np.sort(np.concatenate(found))
    starts = np.cumsum([0, *(len(one) for one in hashes[:-1])])
    pieces = np.split(again, np.searchsorted(again, starts[1:]))
    return [piece - start for piece, start in zip(pieces, starts, strict=True)]
