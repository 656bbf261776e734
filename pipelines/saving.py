"""What a training worker saves and resumes from: DeepSpeed's shards and the average, as checkpoint.py commits them."""

import logging
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from pipelines import checkpoint, storage
from pipelines.ema import Ema
from pipelines.errors import UserError

_OWNER = "attempt"

logger = logging.getLogger(__name__)


def agree(value: Any, device: torch.device) -> Any:
    """Rank 0's `value`, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=device)
    return values[0]


class Saver:
    """The checkpoints of one attempt at a run; every method is collective."""

    def __init__(self, output: str, attempt: str, device: torch.device) -> None:
        """Claim `output`, a folder or URI, for `attempt`; what earlier attempts left half-written is removed.

        Raises:
            UserError: not all workers see the same place.
        """
        self.folder = storage.join(output, "checkpoints")
        self.attempt, self.device = attempt, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        owner = storage.join(self.folder, _OWNER)
        if self.rank == 0:
            storage.write_text(owner, attempt)
            checkpoint.sweep(self.folder)
        dist.barrier()
        seen: list[Any] = [None] * self.world
        dist.all_gather_object(seen, storage.exists(owner) and storage.read_text(owner) == attempt)
        if not all(seen):
            raise UserError(
                f"{output} is not shared by all {self.world} workers",
                "give --root a folder on a shared file system or an s3:// URI",
            )

    def newest(self) -> tuple[str, dict[str, Any]] | None:
        """Path and manifest of the newest good checkpoint, found and verified by rank 0."""
        found: tuple[str, dict[str, Any]] | None = agree(
            checkpoint.newest(self.folder) if self.rank == 0 else None, self.device
        )
        return found

    def load(self, engine: Any, ema: Ema | None, path: str, manifest: dict[str, Any]) -> None:
        """Put a checkpoint that `newest` found into the engine and the average."""
        with tempfile.TemporaryDirectory(prefix="armd-resume-") as scratch:
            folder = checkpoint.local_copy(path, manifest, scratch)
            loaded, _ = engine.load_checkpoint(folder, tag=checkpoint.TAG)
            assert loaded is not None, f"DeepSpeed found nothing in {folder}"
            if ema is not None:
                ema.load(folder, self.rank)
            dist.barrier()  # nobody removes what another still reads
        logger.info("resumed after step %d from %s", manifest["step"], path)

    def save(self, engine: Any, ema: Ema | None, about: dict[str, Any], keep: int) -> None:
        """Write and commit the checkpoint of `about["step"]`, then remove all but the `keep` newest.

        Raises:
            UserError: another attempt has claimed the run meanwhile.
        """
        path = storage.join(self.folder, checkpoint.name(about["step"], self.attempt))
        with tempfile.TemporaryDirectory(prefix=checkpoint.SCRATCH, dir=self._near(path)) as scratch:
            engine.save_checkpoint(scratch, tag=checkpoint.TAG, save_latest=False)
            if ema is not None:
                ema.save(scratch, self.rank)
            files = checkpoint.put_shards(scratch, path)
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, files)  # a barrier too: every rank's files are in place
        if not agree(self._is_ours() if self.rank == 0 else None, self.device):
            raise UserError(
                f"another process has taken over {self.folder}",
                "leave that one running, or stop it and run the same command again",
            )
        if self.rank == 0:
            checkpoint.commit(path, [entry for entries in gathered for entry in entries], about)
            checkpoint.prune(self.folder, path, keep)
        dist.barrier()

    def _is_ours(self) -> bool:
        return storage.read_text(storage.join(self.folder, _OWNER)) == self.attempt

    def _near(self, path: str) -> str | None:
        """Where scratch files go that will be moved to `path`: the same file system where that is local."""
        if not storage.is_local(path):
            return None
        storage.make_dir(self.folder)
        return self.folder
