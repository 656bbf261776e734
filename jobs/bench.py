"""`armd bench WHAT`: every benchmark compares things within one run and prints one line of JSON last."""

import importlib
from collections.abc import Sequence

from jobs.options import choose

BENCHMARKS = {
    "train": "a training step under each kind of order, against the baselines and bare products; needs torch only",
    "decode": "decoding with S = 1 .. 16 streams, against the bare matrix products of its steps; needs torch only",
    "corpus": "the corpus stage against the bare tokenizer on the same text",
    "serve": "the HTTP endpoint under load against the engine alone",
}


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:8}{text}" for name, text in BENCHMARKS.items()]
        print("usage: armd bench WHAT [OPTIONS]\n\n" + "\n".join(lines) + "\n\n  armd bench WHAT --help   its options")
        return 0 if arguments else 2
    name = arguments[0]
    choose(name, BENCHMARKS, "benchmark", f"benchmarks: {', '.join(BENCHMARKS)}")
    importlib.import_module(f"jobs.benchmarks.{name}").main(arguments[1:])
    return 0
