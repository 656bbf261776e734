"""Runs training workers as plain processes over gloo: the training loop without a Ray cluster."""

import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from pipelines.errors import user_error_in
from pipelines.train_loop import Job, train


def run_workers(job: Job, die_at: int | None = None) -> list[dict[str, Any] | BaseException]:
    """Each rank's summary or error. `die_at`: all workers exit without a word after that step, as after a SIGKILL."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store").as_uri()
        processes = [
            context.Process(target=_worker, args=(rank, job, store, results, die_at))
            for rank in range(job.config.n_workers)
        ]
        for process in processes:
            process.start()
        found = {} if die_at else dict(results.get() for _ in processes)
        for process in processes:
            process.join(120)
            assert process.exitcode is not None, "a worker hangs"
    return [found[rank] for rank in sorted(found)]


def _worker(rank: int, job: Job, store: str, results: Any, die_at: int | None) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.config.n_workers))
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.config.n_workers)

    def watch(record: dict[str, Any]) -> None:
        if die_at is not None and record["step"] >= die_at:
            os._exit(9)

    try:
        results.put((rank, train(job, watch)))
    except Exception as error:
        results.put((rank, user_error_in(error) or RuntimeError(traceback.format_exc())))
    dist.destroy_process_group()
