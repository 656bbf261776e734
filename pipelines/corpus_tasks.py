"""Ray Data runs the corpus's units: a task each, whose result comes back as soon as it is there."""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.errors import UserError
from pipelines.sources import InputFile, Unit


def in_tasks(
    function: Callable[[Unit], dict[str, Any]], units: Sequence[Unit], cpus: float = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, `function` of the unit) for each unit as it is finished, in any order; the largest are begun first.

    `function` can be pickled and gives what JSON can hold. It is called again where a process or a machine dies. A task
    takes `cpus` of the cluster's CPUs.

    Raises:
        UserError: as `function` does.
    """
    import ray.data

    from pipelines.runtime import connect

    connect()
    _silence_ray_data()
    sizes = [sum(file.read_bytes for file in unit.files) for unit in units]
    largest_first = sorted(range(len(units)), key=lambda index: -sizes[index])
    items = [{"index": index, "unit": json.dumps(asdict(units[index]))} for index in largest_first]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for row in dataset.map(functools.partial(_run, function=function), num_cpus=cpus).iter_rows():
        if row["error"]:
            raise UserError(*json.loads(row["error"]))
        yield row["index"], json.loads(row["result"])


def _silence_ray_data() -> None:
    """Keep Ray Data's bars and log lines off the terminal: what matters is reported or raised here."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's own; others may have been added, with levels of their own
            handler.setLevel(logging.CRITICAL)


def _run(row: dict[str, Any], function: Callable[[Unit], dict[str, Any]]) -> dict[str, Any]:
    """What a Ray task does: one unit. A `UserError` comes back as a value, since Ray Data does not hand on its type."""
    plain = json.loads(row["unit"])
    files = tuple(InputFile(**file) for file in plain.pop("files"))
    try:
        result = json.dumps(function(Unit(files=files, **plain)))
    except UserError as error:
        return {"index": row["index"], "result": "", "error": json.dumps([error.what, error.fix])}
    return {"index": row["index"], "result": result, "error": ""}
