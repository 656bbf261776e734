"""Saving and loading a model's folder; what is not whole or does not fit is refused by name."""

import json
from pathlib import Path

import pytest
import torch

import armd
from armd import ARMD, Order, Tokenizer
from tests.models import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three two one"] * 10, 270)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Path, ARMD]:
    model = tiny_model(vocab_size=tokenizer.vocab_size).float()
    armd.save(tmp_path, model, tokenizer)
    return tmp_path, model


def test_a_model_comes_back_as_it_was(saved: tuple[Path, ARMD], tokenizer: Tokenizer) -> None:
    folder, model = saved
    loaded, its_tokenizer = armd.load(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert loaded.config == model.config
    assert not loaded.training
    assert its_tokenizer.sha256 == tokenizer.sha256
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens, Order.strided(8, 2)), model(tokens, Order.strided(8, 2)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["delete", "flip"])
def test_damage_is_named(saved: tuple[Path, ARMD], name: str, damage: str) -> None:
    path = saved[0] / name
    content = path.read_bytes()
    path.unlink()
    if damage == "flip":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ValueError, match=str(saved[0])):
        armd.load(saved[0])


def resum(folder: Path) -> None:
    """Make the sums right again, as someone would who changed a file on purpose."""
    import hashlib

    names = ("config.json", "model.safetensors", "tokenizer.json")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("change", [{"d_model": 32}, {"n_layers": 5}, {"colour": 1}, {"n_heads": 3}])
def test_a_configuration_that_does_not_fit_is_named(saved: tuple[Path, ARMD], change: dict) -> None:
    path = saved[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    resum(saved[0])
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
        armd.load(saved[0])


def test_weights_that_are_no_safetensors_are_refused(saved: tuple[Path, ARMD]) -> None:
    torch.save({"a": torch.zeros(1)}, saved[0] / "model.safetensors")
    resum(saved[0])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        armd.load(saved[0])


def test_a_tokenizer_of_another_size_is_refused(saved: tuple[Path, ARMD]) -> None:
    other = Tokenizer.train(["abc abd"], 262)
    with pytest.raises(ValueError, match=str(other.vocab_size)):
        armd.save(saved[0], saved[1], other)
