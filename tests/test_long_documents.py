"""A document of many megabytes in one line: memory is a matter of the text, not of what its tokens take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import resource, sys
from armd.tokenizer import Tokenizer
from pipelines.shards import UnitSettings, make_unit
from pipelines.sources import Unit, input_files

tokenizer = Tokenizer.train(["the cat sat on the mat"], 300)
unit = Unit(files=tuple(input_files([sys.argv[1]])), validation_fraction=0.0)
settings = UnitSettings(output_dir=sys.argv[2], tokenizer_json=tokenizer.to_json())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record = make_unit(unit, settings)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, record["documents"]["used"])
"""
SENTENCE = "the cat sat on the mat\n"
N_BYTES = 8_000_000


@pytest.mark.slow
def test_memory_of_a_long_line(tmp_path: Path) -> None:
    """300 MB, most of it for a piece of a million characters at a time; tokenised as a whole it takes 1.5 GB."""
    text = SENTENCE * (N_BYTES // len(SENTENCE))
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + "\n")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "x.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_kib, used = map(int, done.stdout.split())
    assert used == 1
    assert grown_kib * 1024 < 700e6
