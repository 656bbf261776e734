"""A shard while it is written: documents as token ids, one after the other, and what a corpus tells about them."""

import base64
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from pipelines import storage

SHARDS = "shards"
SAMPLES = 10
"""Documents of a split that are remembered, so that a person can look at them."""
_LENGTH_CLASSES = 40


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type for token ids: uint16 for up to 65,536 entries, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def packed_counts(counts: np.ndarray) -> str:
    """Integers as text for JSON."""
    return base64.b85encode(zlib.compress(counts.astype("<i8").tobytes(), 1)).decode("ascii")


def unpacked_counts(text: str) -> np.ndarray:
    """What `packed_counts` packed, int64."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i8").astype(np.int64)


class ShardFile:
    """A .npy file of one dimension that grows: the header is written again when its length is known."""

    def __init__(self, path: str, vocab_size: int) -> None:
        self._path = path
        self._dtype = token_dtype(vocab_size)
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._lengths = np.zeros(_LENGTH_CLASSES, dtype=np.int64)
        self._samples: list[tuple[str, int, int]] = []
        self._documents = self._tokens = self._bytes = 0

    def __enter__(self) -> "ShardFile":
        self._file = open(self._path, "wb")
        self._write_header()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def append(self, parts: Iterable[list[int]], n_bytes: int, digest: str) -> None:
        """Add a document, its ids in parts; its text has `n_bytes` bytes of UTF-8 and the hash `digest`."""
        start = self._tokens
        for ids in parts:
            array = np.array(ids, dtype=self._dtype)
            self._file.write(array.tobytes())
            np.add.at(self._counts, array, 1)
            self._tokens += len(array)
        length = self._tokens - start
        self._lengths[length.bit_length()] += 1
        self._documents += 1
        self._bytes += n_bytes
        if length and (len(self._samples) < SAMPLES or digest < self._samples[-1][0]):
            self._samples = sorted([*self._samples, (digest, start, length)])[:SAMPLES]

    def finish(self, output_dir: str, split: str) -> dict[str, Any]:
        """Put the closed file in its place; what the record says of the split. No shard for no tokens."""
        shards = []
        if self._tokens:
            digest = storage.sha256_file(self._path)
            path = f"{SHARDS}/{split}-{digest[:24]}.npy"
            storage.put_file(self._path, storage.join(output_dir, path))
            shards.append({"path": path, "sha256": digest, "tokens": self._tokens})
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "shards": shards,
            "counts": packed_counts(self._counts),
            "lengths": np.trim_zeros(self._lengths, "b").tolist(),
            "samples": [list(sample) for sample in self._samples],
        }

    def _write_header(self) -> None:
        """Numpy pads the header of a growing array to a fixed size."""
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self._tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)
