"""The training stage: Ray Train V2 runs the workers of train_loop.py, one a GPU, or CPU processes where there is none.

Ray starts, watches and restarts the workers. Checkpoints and metrics are ours, in the stage's directory: running the
same stage again resumes from the newest committed checkpoint, whatever Ray remembers of an earlier run.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines import allocator, runtime, storage
from pipelines.errors import UserError, user_error_in
from pipelines.manifest import read_manifest, write_manifest
from pipelines.progress import Progress, silent
from pipelines.train_config import TrainConfig


def run(config: TrainConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent) -> dict[str, Any]:
    """Train on the corpus `inputs["corpus"]`; the manifest says what came of it.

    Raises:
        UserError: the cluster has fewer workers than asked, training diverged, or a file is not as its manifest says.
    """
    started = time.time()
    corpus, output_dir = storage.absolute(inputs["corpus"]), storage.absolute(output_dir)  # workers run elsewhere
    read_manifest(corpus)
    runtime.connect(cpus=config.n_workers + 2)
    use_gpu = _use_gpu(config)
    with places(config.n_workers, use_gpu, config.wait_for_nodes, progress):
        where = "GPUs" if use_gpu else "CPU processes"
        progress.update(0, config.total_steps, "steps", f"starting {config.n_workers} workers on {where}")
        with _watching(config.total_steps, progress) as board:
            summary = _fit(config, corpus, output_dir, use_gpu, board)
    return write_manifest(output_dir, "train", summary, started)


def _fit(config: TrainConfig, corpus: str, output_dir: str, use_gpu: bool, board: Any) -> dict[str, Any]:
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.train_loop import Job

    # Ray's own record of a run is of no use to a later one, so each attempt has a name and a folder of its own.
    attempt = f"{os.path.basename(storage.absolute(output_dir))}-{secrets.token_hex(3)}"
    scratch = tempfile.mkdtemp(prefix="armd-train-")
    job = Job(config=config, corpus=corpus, output=output_dir, device="cuda" if use_gpu else "cpu")
    environment = dict(runtime.WORKER_ENVIRONMENT)
    if not use_gpu:  # before DeepSpeed is imported; Ray hides no GPU from a worker that asked for none
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **allocator.ENVIRONMENT}
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job, "board": board, "run": attempt},
        scaling_config=ray.train.ScalingConfig(num_workers=config.n_workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=attempt,
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures, controller_failure_limit=2),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    try:
        summary: dict[str, Any] | None = trainer.fit().return_value
    except Exception as error:
        known = _posted_error(board) or user_error_in(error)
        if known is None:
            raise
        raise known from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if summary is None:
        raise _posted_error(board) or RuntimeError("the workers ended without a summary or an error")
    return summary


def work(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What each Ray worker runs: rank 0's summary, None after an error that the user must mend.

    Such an error may strike one rank while the others wait for it. So it is put up where the driver looks and raised
    here, whereupon Ray ends all ranks; the group that it then starts finds the error and does not meet it again.
    """
    import ray
    import torch.distributed as dist

    from pipelines.metrics import Gauges
    from pipelines.train_loop import train

    board = settings["board"]
    if ray.get(board.error.remote()) is not None:
        return None
    gauges = Gauges(settings["run"]) if dist.get_rank() == 0 else None
    last = 0.0

    def watch(record: dict[str, Any]) -> None:
        nonlocal last
        if record["kind"] != "progress" and gauges is not None:
            gauges.set(record)
        if record["kind"] == "train":
            return
        ends = record["step"] == settings["job"].config.total_steps
        if record["kind"] == "validation" or ends or time.monotonic() - last > 0.5:
            last = time.monotonic()
            board.post.remote(record)

    try:
        return train(settings["job"], watch)
    except UserError as error:
        ray.get(board.fail.remote(error.args))
        raise


def _posted_error(board: Any) -> UserError | None:
    import ray

    found = ray.get(board.error.remote())
    return None if found is None else UserError(*found)


@contextlib.contextmanager
def places(n_workers: int, use_gpu: bool, seconds: float, progress: Progress = silent) -> Iterator[None]:
    """A block in which the cluster has a place for every worker.

    Ray itself would leave a run that cannot be placed pending without a word. An autoscaling cluster is asked to grow
    and given `seconds`; it may shrink again when the block ends.

    Raises:
        UserError: the places are still missing then; says how many there are.
    """
    from ray.autoscaler.sdk import request_resources

    asked = False
    try:
        asked = _wait_for_places(n_workers, "GPU" if use_gpu else "CPU", seconds, progress)
        yield
    finally:
        if asked:
            request_resources(bundles=[])  # else the autoscaler would hold the nodes for ever


def _wait_for_places(n_workers: int, kind: str, seconds: float, progress: Progress) -> bool:
    """Wait; whether the autoscaler was asked to grow."""
    import ray
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + (seconds if runtime.on_cluster() else 0)
    asked = False
    while (there := int(ray.cluster_resources().get(kind, 0))) < n_workers:
        if time.monotonic() > deadline:
            if asked:
                request_resources(bundles=[])
            raise UserError(
                f"{n_workers} training workers need {n_workers} {kind}s, the cluster has {there}",
                f"pass --train.n-workers {there}" if there else "add nodes to the cluster, or pass --train.device cpu",
            )
        if not asked:
            request_resources(bundles=[{kind: 1}] * n_workers)
            asked = True
        left = max(0.0, deadline - time.monotonic())
        progress.update(there, n_workers, f"{kind}s", f"waiting {left:.0f} s more for the cluster to grow")
        time.sleep(1)
    return asked


def _use_gpu(config: TrainConfig) -> bool:
    import ray

    if config.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= config.n_workers
    return config.device == "gpu"


@contextlib.contextmanager
def _watching(total_steps: int, progress: Progress) -> Iterator[Any]:
    """A board that rank 0 posts to, wherever it runs; what it says goes to `progress` until the block ends."""
    import ray

    board = ray.remote(num_cpus=0)(_Board).remote()
    done = threading.Event()

    def poll() -> None:
        validation = ""
        finished = False
        while not finished:
            finished = done.wait(0.5)  # and once more at the end, for what was posted last
            with contextlib.suppress(ray.exceptions.RayError):  # the cluster went down: the main thread says so
                for record in ray.get(board.take.remote()):
                    if record["kind"] == "validation" and record["n_streams"] == 1:
                        validation = f", held-out {record['loss']:.3f}"
                    if record["kind"] != "validation":
                        progress.update(record["step"], total_steps, "steps", f"loss {record['loss']:.3f}{validation}")

    thread = threading.Thread(target=poll, name="train-progress", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        done.set()
        thread.join(5)
        ray.kill(board)


class _Board:
    """Metrics records on their way from rank 0 to the driver."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._error: tuple[str, str] | None = None

    def post(self, record: dict[str, Any]) -> None:
        """Put up a record."""
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """Take down all records."""
        records, self._records = self._records, []
        return records

    def fail(self, error: tuple[str, str]) -> None:
        """Put up what a user must mend; the first one stays."""
        self._error = self._error or error

    def error(self) -> tuple[str, str] | None:
        """What a user must mend, None where nothing was put up."""
        return self._error
