"""Fixtures that several test files share; the Ray cluster is one a session, started when the first test asks for it."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from armd import ARMD

# Before torch is imported, and for child processes too: at the tests' sizes a second thread helps little, and on a busy
# machine the two wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private cluster on this machine with four logical CPUs; ends with the session."""
    import ray

    from pipelines import runtime

    runtime.connect(cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def sharp() -> "ARMD":
    """A model whose predictions depend so much on what was written that drafts are rejected every few steps."""
    import torch

    from tests.models import tiny_model

    made = tiny_model(max_length=64)
    with torch.no_grad():
        made.embedding.weight.mul_(2)
    return made


@pytest.fixture
def flex_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets FlexAttention's uncompiled form run backward on a CPU, which it refuses for want of a kernel."""
    import torch

    torch._dynamo.reset()  # many small shapes in one process would meet its limit of recompilations
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
