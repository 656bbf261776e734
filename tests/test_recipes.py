"""The recipes: the figures of the paper where a recipe claims to be its run, and docstrings that say what they must."""

import dataclasses
import inspect
import json

import pytest

from armd.config import ARCHITECTURES
from jobs import pipeline
from jobs.recipes import RECIPES, Recipe, Study


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_command_hardware_time_and_expectation(name: str) -> None:
    docstring = inspect.getdoc(RECIPES[name]) or ""
    for heading in (f"Command: armd run {name}", "Hardware:", "Time:", "Expect:"):
        assert heading in docstring, heading
    assert "\n" not in docstring.partition("\n\n")[0], "the first line stands in the list of recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole_frozen_and_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert isinstance(recipe, Recipe | Study)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.steps = 1  # type: ignore[misc]
    plain = pipeline.resolved(recipe)
    assert json.loads(json.dumps(plain)) == plain
    assert RECIPES[name]() == recipe


@pytest.mark.parametrize(
    ("name", "architecture", "schedule", "corpus"),
    [
        # (batch, steps, strided, i_ar, rho, i_perm), (length, tokenizer's folder)
        ("small", "small", (512, 400_000, 10_000, 9_000, 32, 48_000), (1024, "gpt2")),
        ("medium", "medium", (512, 300_000, 10_000, 9_000, 32, 48_000), (1024, "gpt2")),
        ("lm1b", "small", (512, 1_000_000, 10_000, 100_000, 8, 300_000), (128, "bert-base-uncased")),
    ],
)
def test_the_papers_runs(name: str, architecture: str, schedule: tuple[int, ...], corpus: tuple[int, str]) -> None:
    recipe = RECIPES[name]()
    train = recipe.train
    assert train.architecture == ARCHITECTURES[architecture]
    assert schedule == (
        train.batch_size,
        train.steps,
        train.strided_steps,
        train.ar_steps,
        train.max_shuffled,
        train.permutation_steps,
    )
    assert (train.learning_rate, train.warmup_steps, train.dtype) == (3e-4, 2_500, "bfloat16")
    assert recipe.corpus.sequence_length == corpus[0]
    assert recipe.corpus.tokenizer is not None
    assert recipe.corpus.tokenizer.endswith(corpus[1])


def test_the_demo_fits_two_cores() -> None:
    recipe = RECIPES["demo"]()
    assert recipe.corpus.sources == ("python-docs",)
    assert recipe.corpus.tokenizer is None
    assert recipe.train.n_workers == 2
    assert recipe.train.total_steps * recipe.train.batch_size * recipe.corpus.sequence_length < 20e6
    # Every part of the training happens: left-to-right, permutation, strided fine-tuning, several checkpoints.
    assert 0 < recipe.train.ar_steps < recipe.train.permutation_steps < recipe.train.steps
    assert recipe.train.strided_steps > 0
    assert recipe.train.checkpoint_every * 2 <= recipe.train.total_steps
    assert recipe.evaluate.streams == (1, 2, 4)
