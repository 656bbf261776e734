"""Bad input, as a table: each is one line saying what and one saying how to mend it, and an exit status that is not 0.

Everything goes through the real command line and the real stages. Where a stage needs what earlier ones make, a small
corpus, checkpoint and model stand in the directories that those would have written.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import armd
from armd.config import Architecture
from armd.tokenizer import Tokenizer
from jobs import options, pipeline
from jobs.cli import main
from jobs.recipes import RECIPES
from pipelines import checkpoint, storage
from pipelines.manifest import write_manifest

REPOSITORY = Path(__file__).resolve().parent.parent
LENGTH = 16
TEXTS = ["Return the first line.", "Close the file, then return.", "Raise an error."]
SMALL = ["--corpus.sources", "texts", "--corpus.sequence-length", str(LENGTH)]
SMALL += ["--evaluate.sample-tokens", "8", "--evaluate.repeats", "1", "--evaluate.prompts", "Re"]


@dataclass
class Place:
    """A working directory with a root whose corpus, train and export stages are finished."""

    folder: Path
    root: Path
    tokenizer: Tokenizer
    port: int
    """A port that is taken."""

    def step(self, stage: str) -> Path:
        """The directory of a stage of `armd run demo` with the options `SMALL`."""
        recipe = options.parse(RECIPES["demo"](), SMALL, command="", description="")
        return Path(pipeline.build(recipe, "demo")[stage].directory(str(self.root)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 280)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Iterator[Place]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("ARMD_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, content in {"texts/a.txt": "\n".join(TEXTS), "empty/a.txt": "", "odd/a.pdf": "%PDF"}.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    Path("nothing").mkdir()
    Path("latin1.txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Place(tmp_path, tmp_path / "root", tokenizer, int(taken.getsockname()[1]))
        finished_stages(place)
        yield place


def finished_stages(place: Place) -> None:
    """What corpus, train and export would have left, with an untrained model."""
    corpus, train, export = (place.step(stage) for stage in ("corpus", "train", "export"))
    stream = [token for text in TEXTS for token in [*place.tokenizer.encode(text), place.tokenizer.eos_id]] * 4
    (corpus / "shards").mkdir(parents=True)
    np.save(corpus / "shards" / "0.npy", np.array(stream, dtype=np.uint16))
    place.tokenizer.save(corpus / "tokenizer.json")
    sha256 = storage.sha256_file(str(corpus / "shards" / "0.npy"))
    split = {
        "documents": 12,
        "tokens": len(stream),
        "bytes": 4 * sum(map(len, TEXTS)),
        "shards": [{"path": "shards/0.npy", "sha256": sha256, "tokens": len(stream)}],
    }
    body = {
        "tokenizer_sha256": place.tokenizer.sha256,
        "sequence_length": LENGTH,
        "dtype": "uint16",
        "vocab_size": place.tokenizer.vocab_size,
        "splits": {"train": split, "validation": split},
        "unigram": {"validation_nats_per_token": 4.0},
    }
    write_manifest(str(corpus), "corpus", body, time.time())

    saved = train / "checkpoints" / checkpoint.name(3, "0123abcd")
    shards = place.folder / "scratch"
    shards.mkdir()
    (shards / "weights.pt").write_bytes(b"weights")
    checkpoint.commit(str(saved), checkpoint.put_shards(str(shards), str(saved)), {"step": 3})
    write_manifest(str(train), "train", {"checkpoint": f"checkpoints/{saved.name}"}, time.time())

    shape = Architecture(n_layers=2, n_two_stream_layers=1, d_model=16, n_heads=2, d_prefix=8)
    config = shape.model_config(place.tokenizer.vocab_size, LENGTH)
    model = armd.ARMD(config, generator=torch.Generator().manual_seed(0))
    armd.save(export, model, place.tokenizer)
    write_manifest(str(export), "export", {}, time.time())


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, what and mend of a command line that must be refused in two lines."""
    status = main(arguments)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("fix: ")
    assert len(lines[1]) > len("fix: ")
    return status, lines[0].removeprefix("error: "), lines[1].removeprefix("fix: ")


USAGE = [
    # command line, what the error names, what the mend offers
    ("rnu demo", "'rnu'", "'run'"),
    ("run dmeo", "'dmeo'", "'demo'"),
    ("plan smal", "'smal'", "'small'"),
    ("run nothinglikeit", "'nothinglikeit'", "demo, small, medium, lm1b"),
    ("run --root x demo", "--root", "demo"),
    ("run demo --until trian", "'trian'", "'train'"),
    ("run demo --train.step 5", "--train.step", "--train.steps"),
    ("run demo --train.bach-size 5", "--train.bach-size", "--train.batch-size"),
    ("run demo --corpus.source x", "--corpus.source", "--corpus.sources"),
    ("run demo --learning-rate 1", "--learning-rate", "--train.learning-rate"),
    ("run demo --train.archtecture.n-layers 3", "--train.archtecture", "--train.architecture.n-layers"),
    ("run demo --zzz 1", "--zzz", "`armd run demo --help`"),
    ("run demo extra", "'extra'", "`armd run demo --help`"),
    ("run demo --root", "--root", "STR"),
    ("run demo --root=", "--root must be a folder", "default, runs,"),
    ("run demo --corpus.weights 0.5 0.5", "--corpus.weights must be one for each of the 1", "default, nothing,"),
    ("run demo --root s3://", "'s3://'", "s3://bucket/runs"),
    ("plan demo --root s3:///", "'s3:///'", "s3://bucket/runs"),
    ("run demo --train.betas 0.9", "--train.betas", "FLOAT"),
    ("run demo --train.steps many", "--train.steps cannot be 'many'", "INT"),
    ("run demo --train.steps=1.5", "'1.5'", "INT"),
    ("run demo --train.dtype float61", "'float61'", "float32"),
    ("run demo --train.zero-stage 4", "'4'", "1, 2, 3"),
    (
        "run demo --train.steps -5",
        "--train.steps must be at least 0, not -5",
        "or choose what fits: at least 0",
    ),
    ("run demo --train.batch-size 15", "15", "--train.batch-size"),
    ("run demo --train.micro-batch-size 3", "3", "--train.micro-batch-size"),
    ("run demo --train.learning-rate 0", "0", "--train.learning-rate"),
    ("run demo --train.prefix-probability 1.5", "1.5", "--train.prefix-probability"),
    ("run demo --train.ema-decay 1.5", "1.5", "--train.ema-decay"),
    ("run demo --train.permutation-steps 3", "3", "--train.permutation-steps"),
    ("run demo --train.activation-checkpointing --train.model autoregressive", "autoregressive", "default, False"),
    ("run demo --train.architecture.n-heads 7", "7", "n-heads"),
    ("run demo --train.architecture.n-two-stream-layers 9", "9", "--train.architecture.n-two-stream-layers"),
    ("run demo --corpus.vocab-size 10", "10", "--corpus.vocab-size"),
    ("run demo --corpus.sequence-length 1", "1", "--corpus.sequence-length"),
    ("run demo --corpus.validation-fraction 1", "1", "--corpus.validation-fraction"),
    ("run demo --corpus.max-quarantined 2", "2", "--corpus.max-quarantined"),
    ("run demo --evaluate.top-p 0", "0", "--evaluate.top-p"),
    ("run demo --evaluate.streams 0", "0", "--evaluate.streams"),
    ("run demo --deploy.port 70000", "70000", "default, 8000, or choose what fits: between 1 and 65535"),
    ("plan demo --tokens-per-second 0", "0", "--tokens-per-second"),
    ("sample", "MODEL_DIR", "`armd sample --help`"),
    ("sample MODEL --n-stream 2", "--n-stream", "--n-streams"),
    ("sample MODEL --n-streams 0", "--n-streams must be at least 1, not 0", "--n-streams"),
    ("sample MODEL --temperature -1", "-1", "--temperature"),
    ("sample MODEL --top-p 1.5", "1.5", "--top-p"),
    ("sample MODEL --max-tokens -1", "-1", "--max-tokens"),
    ("sample MODEL --n 0", "--n must be at least 1, not 0", "default, 1, or"),
    ("sample MODEL --mode fast", "--mode cannot be 'fast'", "parallel, exact"),
    ("sample MODEL --mode exact --threshold 0.5", "threshold must be 0 in exact mode", "--mode"),
    ("sample MODEL --threshold 1.5", "--threshold must be between 0 and 1, not 1.5", "--threshold"),
    ("sample MODEL --template [MASK] --prompt The", "prompt must be left out with template", "--"),
    ("sample MODEL --template [MASK] --max-tokens 3", "max_tokens must be left out with template", "--"),
    ("sample MODEL --quiet x", "there is no option --quiet", "`armd sample --help` lists"),
    ("score MODEL", "FILE", "`armd score --help`"),
    ("score MODEL texts/a.txt --n-streams 0", "0", "--n-streams"),
    ("score MODEL texts/a.txt --one-by-one", "--n-streams must be at least 2 with --one-by-one, not 1", "--n-streams"),
    ("score MODEL texts/a.txt --random-orders -1", "--random-orders must be at least 0, not -1", "default, 0, or"),
    ("score MODEL texts/a.txt --random-orders many", "--random-orders cannot be 'many'", "INT"),
    ("serve", "MODEL_DIR", "`armd serve --help`"),
    ("serve MODEL --port 70000", "70000", "--port"),
    ("doctor --rot x", "--rot", "--root"),
    ("doctor --port 99999999", "--port must be between 1 and 65535", "8000"),
]


@pytest.mark.parametrize(("command", "what", "mend"), USAGE, ids=[line for line, *_ in USAGE])
def test_a_misused_command_line(command: str, what: str, mend: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, error, fix = refuse(command.split(), capsys)
    assert status == 2
    assert what in error
    assert mend in fix


MISTAKES = [
    # command line (ROOT, MODEL, PORT and SMALL stand for the fixture's), what the error names, what the mend offers
    ("run demo --root texts/a.txt", "texts/a.txt", "--root"),
    ("run demo --root texts/a.txt/deep", "texts/a.txt", "--root"),
    ("run demo --root ROOT --corpus.sources missing.txt", "missing.txt", "--corpus.sources"),
    ("run demo --root ROOT --corpus.sources texts missing/", "missing/", "--corpus.sources"),
    ("run demo --root ROOT --corpus.sources no*.jsonl", "no*.jsonl", "pattern"),
    ("run demo --root ROOT --corpus.sources nothing", "nothing", "--corpus.sources"),
    ("run demo --root ROOT --corpus.sources empty", "empty", "--corpus.sources"),
    ("run demo --root ROOT --corpus.sources odd", "odd", ".txt"),
    ("run demo --root ROOT --corpus.validation-sources missing/", "missing/", "--corpus.validation-sources"),
    (
        "run demo --root ROOT --corpus.sources texts --corpus.validation-sources texts/a.txt",
        "texts/a.txt is in --corpus.sources and in --corpus.validation-sources",
        "one of them",
    ),
    ("run demo --root ROOT --corpus.tokenizer missing-tokenizer", "missing-tokenizer", "tokenizer.json"),
    ("run small --root ROOT", "data/openwebtext", "--corpus.sources"),
    ("run lm1b --root ROOT", "data/lm1b", "--corpus.sources"),
    ("plan demo --corpus.tokenizer missing-tokenizer", "missing-tokenizer", "--corpus.tokenizer"),
    ("plan demo --corpus.tokenizer nothing", "nothing", "--corpus.tokenizer"),
    ("sample missing-model", "missing-model", "export"),
    ("sample texts", "texts", "export"),
    ("sample MODEL --max-tokens 99", "99", "16"),
    ("sample MODEL --prompt LONG", "16", "--prompt"),
    ("sample MODEL --template [MASK:17]", "17", "--template"),
    ("score missing-model texts/a.txt", "missing-model", "export"),
    ("score MODEL missing.txt", "missing.txt", "exists"),
    ("score MODEL empty/a.txt", "empty/a.txt", "text"),
    ("score MODEL latin1.txt", "latin1.txt", "utf-8"),
    ("score MODEL texts", "texts", "file"),
    ("run demo SMALL --root ROOT --until train --train.batch-size 100000 TOO_MANY", "cores", "--train.n-workers"),
    ("run demo --root ROOT --deploy.port PORT", "PORT", "--deploy.port"),
    ("run demo --root ROOT --deploy.host 0.0.0.0", "0.0.0.0", "ARMD_API_KEY"),
    ("serve missing-model", "missing-model", "export"),
    ("serve MODEL --port PORT", "PORT", "port"),
    ("serve MODEL --host 0.0.0.0", "0.0.0.0", "ARMD_API_KEY"),
    ("run demo SMALL --root ROOT --until deploy --deploy.port PORT", "PORT", "port"),
]


@pytest.mark.parametrize(("command", "what", "mend"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake(command: str, what: str, mend: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"ROOT": [str(place.root)], "MODEL": [str(place.step("export"))], "PORT": [str(place.port)]}
    words |= {"TOO_MANY": ["--train.n-workers", "10000", "--train.micro-batch-size", "1", "--train.seed", "1"]}
    words |= {"SMALL": SMALL, "LONG": ["Return. " * 40]}
    arguments = [one for word in command.split() for one in words.get(word, [word])]
    status, error, fix = refuse(arguments, capsys)
    assert status == 1
    assert what.replace("PORT", str(place.port)) in error
    assert mend in fix


def flip(path: Path) -> None:
    """Change one byte near the file's end."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


def test_a_shard_that_does_not_match_its_manifest(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    flip(place.step("corpus") / "shards" / "0.npy")
    status, error, _ = refuse(["run", "demo", *SMALL, "--root", str(place.root), "--until", "evaluate"], capsys)
    assert status == 1
    assert "shards/0.npy" in error


def test_a_checkpoint_that_does_not_match_its_manifest(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.step("export") / "manifest.json").unlink()
    (shard,) = place.step("train").glob("checkpoints/*/*.pt")
    flip(shard)
    status, error, fix = refuse(["run", "demo", *SMALL, "--root", str(place.root), "--until", "export"], capsys)
    assert status == 1
    assert shard.name in error
    assert str(shard.parent) in fix


def test_a_checkpoint_that_was_never_committed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.step("export") / "manifest.json").unlink()
    (mark,) = place.step("train").glob("checkpoints/*/COMMITTED")
    mark.unlink()
    status, error, _ = refuse(["run", "demo", *SMALL, "--root", str(place.root), "--until", "export"], capsys)
    assert status == 1
    assert mark.parent.name in error


def test_a_tokenizer_that_is_not_the_corpuss(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = place.step("corpus") / "manifest.json"
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**body, "tokenizer_sha256": "0" * 64}))
    status, error, fix = refuse(["run", "demo", *SMALL, "--root", str(place.root), "--until", "evaluate"], capsys)
    assert status == 1
    assert "tokenizer" in error
    assert "tokenizer" in fix


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("command", ["sample", "score"])
def test_a_damaged_model(command: str, name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    flip(place.step("export") / name)
    arguments = [command, str(place.step("export")), *(["texts/a.txt"] if command == "score" else [])]
    status, error, _ = refuse(arguments, capsys)
    assert status == 1
    assert name in error


def test_the_stand_ins_are_good(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: nothing above is refused for another reason than its mistake."""
    model = str(place.step("export"))
    assert main(["run", "demo", *SMALL, "--root", str(place.root), "--until", "evaluate"]) == 0
    assert "[export] already there" in capsys.readouterr().out
    assert main(["sample", model, "--prompt", "Re", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("Re")
    assert main(["score", model, "texts/a.txt", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["bytes"] == len("\n".join(TEXTS))
    assert scored["tokens"] == len(place.tokenizer.encode("\n".join(TEXTS)))
    # An untrained model knows nothing.
    assert 0.9 < scored["perplexity"] / place.tokenizer.vocab_size < 4


@pytest.mark.parametrize("arguments", [["run", "dmo"], ["run", "demo", "--corpus.sources", "missing.txt"]])
def test_as_a_process(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", *arguments, *(["--root", str(tmp_path)] if len(arguments) > 2 else [])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "fix"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "run", "demo", "--debug", "--corpus.sources", "x", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_has(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "demo", *SMALL, "--root", str(place.root), "--until", "train", "--train.n-workers", "64"]
    began = time.monotonic()
    status, error, fix = refuse([*arguments, "--train.batch-size", "64", "--train.micro-batch-size", "1"], capsys)
    assert time.monotonic() - began < 60
    assert status == 1
    assert "64" in error
    assert "--train.n-workers" in fix


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_source_that_holds_no_text(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    Path("blank").mkdir()
    Path("blank/a.txt").write_text(" \n\n \n")
    arguments = ["run", "demo", "--corpus.sources", "blank", "--root", str(place.root), "--until", "corpus"]
    status, error, fix = refuse(arguments, capsys)
    assert status == 1
    assert "text" in error
    assert "--corpus" in fix
