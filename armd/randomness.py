"""Generators: a random stream of its own for whatever is named, the same on every machine."""

import hashlib

import torch


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator for what `parts` name.

    The parts are hashed to the 32 bits that torch's CPU generator takes from a seed, so that seeds which differ only
    above them, or in their order, still give different streams.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
