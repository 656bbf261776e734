"""The corpus stage and the reader on an object store that fails: S3 on loopback, by itself and behind a fault proxy."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from pipelines import corpus, storage
from pipelines.corpus_config import CorpusConfig
from pipelines.errors import UserError
from pipelines.manifest import verify_files
from pipelines.shard_cache import ShardCache
from pipelines.sources import Unit
from pipelines.windows import WindowIndex
from tests.fault_proxy import faulty
from tests.object_store import SECRETS, Address, s3_server

BUCKET = "corpus-test"


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_tasks(function: Callable[[Unit], dict], units: list[Unit]) -> enumerate:
        return enumerate(json.loads(json.dumps(function(unit))) for unit in units)

    monkeypatch.setattr(corpus, "in_tasks", in_tasks)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """An S3 server with an empty bucket, which the environment names."""
    with s3_server(monkeypatch, BUCKET) as address:
        yield address


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Some documents in two files, a record of which cannot be read."""
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshr", k=generator.randint(2, 7))) for _ in range(200)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(2):
        lines = [json.dumps({"text": " ".join(generator.choices(words, k=60))}) for _ in range(30)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n" + "{torn" * number)
    return folder


def config(source: str) -> CorpusConfig:
    small = {"vocab_size": 400, "sequence_length": 32, "validation_fraction": 0.2, "unit_bytes": 12_000}
    return CorpusConfig(sources=(source,), max_quarantined=0.1, **small)  # type: ignore[arg-type]


def upload(texts: Path) -> str:
    for path in sorted(texts.iterdir()):
        storage.write_bytes(f"s3://{BUCKET}/source/{path.name}", path.read_bytes())
    return f"s3://{BUCKET}/source"


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_store_that_fails_a_third_of_the_requests(
    tmp_path: Path, texts: Path, store: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage completes with the files it makes on a disk, and the reader reads them."""
    source, out = upload(texts), f"s3://{BUCKET}/runs/out"
    local = corpus.run(config(str(texts)), {}, str(tmp_path / "local"))
    with faulty(store, share=0.3) as proxy:
        point_at(proxy.url, monkeypatch)
        manifest = corpus.run(config(source), {}, out)
        assert manifest["splits"] == local["splits"]
        assert manifest["documents"] == local["documents"]
        index = WindowIndex(out, "train", ShardCache(str(tmp_path / "cache")))
        expected = WindowIndex(str(tmp_path / "local"), "train")
        assert [index[i].tolist() for i in range(len(index))] == [expected[i].tolist() for i in range(len(expected))]
    assert len(proxy.requests) == 5, "every kind of fault, and none"
    point_at(f"http://{store[0]}:{store[1]}", monkeypatch)
    assert storage.list_names(f"{out}/shards") == storage.list_names(str(tmp_path / "local" / "shards"))
    for split in manifest["splits"].values():
        verify_files(out, split["shards"])


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_store_that_is_down_is_named_and_no_key_shown(
    tmp_path: Path, texts: Path, store: Address, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Every request of a kind for shards or sources fails: the error names bucket and key; a later run completes."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    source, out = upload(texts), f"s3://{BUCKET}/runs/out"
    key = "/source/1.jsonl" if method == "GET" else "/runs/out/shards/"
    with faulty(store, share=1.0, faults=("503",), only=(method, key)) as proxy:
        point_at(proxy.url, monkeypatch)
        with pytest.raises(UserError) as error:
            corpus.run(config(source), {}, out)
    message = error.value.what + error.value.fix
    assert f"s3://{BUCKET}{key}" in message
    assert "run the same command again" in message
    assert not [secret for secret in SECRETS if secret in message]
    assert "\n" not in message
    assert proxy.requests["503"]
    point_at(f"http://{store[0]}:{store[1]}", monkeypatch)
    assert not storage.exists(f"{out}/manifest.json")
    local = corpus.run(config(str(texts)), {}, str(tmp_path / "local"))
    assert corpus.run(config(source), {}, out)["splits"] == local["splits"]
