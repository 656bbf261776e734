"""A small finished corpus made by hand, in the layout that the corpus stage writes."""

import time
from pathlib import Path

import numpy as np

from armd import Tokenizer
from pipelines import storage
from pipelines.manifest import write_manifest

SENTENCES = (
    "the cat sat on the mat",
    "a dog ran to the old red barn",
    "we saw it rain all day long",
    "no two days are one",
)


def make_corpus(folder: Path, sequence_length: int = 16, n_documents: int = 150, seed: int = 0) -> str:
    """Write the corpus into `folder`: two training shards and one of validation; returns the folder as a string."""
    generator = np.random.default_rng(seed)
    documents = [". ".join(generator.permutation(SENTENCES)[:3]) for _ in range(n_documents)]
    tokenizer = Tokenizer.train(documents, 280)
    storage.write_text(str(folder / "tokenizer.json"), tokenizer.to_json())
    splits = {}
    for split, parts in (("train", np.array_split(documents[:-20], 2)), ("validation", [documents[-20:]])):
        shards = [_shard(folder, f"{split}-{i}", part, tokenizer) for i, part in enumerate(parts)]
        splits[split] = {"documents": len(documents), "tokens": sum(s["tokens"] for s in shards), "shards": shards}
    body = {
        "splits": splits,
        "sequence_length": sequence_length,
        "tokenizer_sha256": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16",
    }
    write_manifest(str(folder), "corpus", body, time.time())
    return str(folder)


def _shard(folder: Path, name: str, documents: list[str], tokenizer: Tokenizer) -> dict:
    tokens = [token for text in documents for token in [*tokenizer.encode(str(text)), tokenizer.eos_id]]
    path = folder / "shards" / f"{name}.npy"
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.array(tokens, dtype=np.uint16))
    return {"path": f"shards/{name}.npy", "sha256": storage.sha256_file(str(path)), "tokens": len(tokens)}
