"""Runs training workers as plain processes over gloo: the training loop without a Ray cluster."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from pipelines.errors import user_error_in
from pipelines.train_loop import Job, train

Prepare = Callable[[], None]
"""A function of a module, called in each worker before it trains: what a test changes there."""


def run_workers(job: Job, prepare: Prepare | None = None) -> list[dict[str, Any] | BaseException]:
    """Each rank's summary or error; [] where the workers died without a word, as after a SIGKILL."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store").as_uri()
        processes = [
            context.Process(target=_worker, args=(rank, job, store, results, prepare))
            for rank in range(job.config.n_workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            assert process.exitcode is not None, "a worker hangs"
        found = dict(results.get() for _ in processes) if not any(p.exitcode for p in processes) else {}
    return [found[rank] for rank in sorted(found)]


def _worker(rank: int, job: Job, store: str, results: Any, prepare: Prepare | None) -> None:
    n_workers = str(job.config.n_workers)
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=n_workers, LOCAL_WORLD_SIZE=n_workers)
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.config.n_workers)

    if prepare is not None:
        prepare()
    try:
        results.put((rank, train(job, lambda record: None)))
    except Exception as error:
        results.put((rank, user_error_in(error) or RuntimeError(traceback.format_exc())))
    dist.destroy_process_group()
    # At the interpreter's end a thread of the libraries that still runs now and then aborts the process
    # ("terminate called without an active exception"); what the worker had to say has been said.
    os._exit(0)
