"""`armd serve`: the HTTP endpoint of a trained model on this machine, until it is interrupted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from jobs import options
from pipelines.serving.config import DeployConfig

COMMAND = "armd serve"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Hold a trained model's HTTP endpoint on this machine until Ctrl-C."""

    model_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_DIR")] = tyro.MISSING
    """The export stage's directory: a folder or a URI."""
    deploy: Annotated[DeployConfig, tyro.conf.arg(name="")] = field(default_factory=DeployConfig)
    """The endpoint."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    chosen = options.parse(ServeOptions(), arguments, command=COMMAND, description=ServeOptions.__doc__ or "")
    from pipelines.serving import launch

    launch.serve_forever(chosen.model_dir, chosen.deploy)
    return 0
