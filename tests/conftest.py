"""Fixtures that several test files share: one Ray cluster a session, started when the first test asks for it."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private cluster on this machine with four logical CPUs; ends with the session."""
    import ray

    from pipelines import runtime

    runtime.connect(cpus=4)
    yield
    ray.shutdown()
