"""The folder of an exported model on this machine, wherever it was exported to."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from armd.config import MODEL_FILES
from pipelines import storage


@contextlib.contextmanager
def local_model(uri: str) -> Iterator[str]:
    """A local folder with the files of the model at `uri`: its own folder, or a copy that lasts as long as the block.

    A file that is missing there is missing here; `armd.load` verifies what it finds and names it.
    """
    if storage.is_local(uri):
        yield storage.absolute(uri)
        return
    with tempfile.TemporaryDirectory(prefix="armd-model-") as folder:
        for name in MODEL_FILES:
            with contextlib.suppress(FileNotFoundError):
                os.replace(storage.fetch_file(storage.join(uri, name), folder), os.path.join(folder, name))
        yield folder
