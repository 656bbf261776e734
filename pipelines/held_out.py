"""The held-out windows that a finished model is measured on."""

from typing import Any

from pipelines.errors import UserError
from pipelines.manifest import read_manifest


def windows(corpus_dir: str, most: int, cache_dir: str, *, spread: bool = False) -> Any:
    """(n, N) int64 windows of the validation split, n at most `most`: its first ones, or `spread` over all of it.

    Raises:
        UserError: the split is shorter than one window, or damaged.
    """
    import numpy as np

    from pipelines.shard_cache import ShardCache
    from pipelines.windows import WindowIndex

    index = WindowIndex(corpus_dir, "validation", ShardCache(cache_dir))
    count = min(most, len(index))
    if count == 0:
        raise UserError(
            f"the validation split of {corpus_dir} is shorter than one window of {index.sequence_length} tokens",
            "give the corpus more text, a larger --corpus.validation-fraction or a smaller --corpus.sequence-length",
        )
    return np.stack([index[i * len(index) // count if spread else i] for i in range(count)])


def check_tokenizer(corpus_dir: str, tokenizer: Any, model_dir: str) -> None:
    """Check that a model's tokenizer made the corpus.

    Raises:
        UserError: another one did.
    """
    if tokenizer.sha256 != read_manifest(corpus_dir)["tokenizer_sha256"]:
        raise UserError(
            f"the model in {model_dir} does not have the tokenizer of the corpus in {corpus_dir}",
            "evaluate a model on a corpus made with its own tokenizer (--corpus.tokenizer)",
        )
