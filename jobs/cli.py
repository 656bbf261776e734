"""The command `armd`. Every command is imported when it is asked for: `armd bench train` needs torch only.

A mistake that a user can mend is two lines on stderr, what and how to mend it, and no traceback without `--debug`.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence

from jobs.options import UsageError, choose
from pipelines.errors import user_error_in

COMMANDS = {
    "run": "run a recipe's stages: corpus, train, export, evaluate, deploy, report; what is done is reused",
    "plan": "what a recipe will need: parameters, FLOPs, memory a rank, steps, disk, time; runs nothing",
    "sample": "write text with a trained model",
    "score": "likelihood of a text file under a trained model",
    "serve": "hold a trained model's HTTP endpoint on this machine",
    "doctor": "check the installation, this machine and the cluster",
    "bench": "measure speed; prints one line of JSON last",
}

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception)\b: .*", re.MULTILINE)  # in a traceback; the first is the first cause

HELP = """usage: armd COMMAND ...

Auto-regressive masked diffusion language models: train, evaluate, sample and serve them.

commands:
{commands}

  armd COMMAND --help   what a command takes
  --debug               with any command: show the traceback of an error

examples:
  armd run demo                           everything, on this machine, in minutes
  armd plan small                         what the paper's 125M run would need
  armd sample runs/export-* --prompt The  text from the model that `armd run demo` trained
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, the process's by default. The exit status: 0 success, 1 failure, 2 misuse, 130 stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"], debug=debug)
    except SystemExit as stop:  # help was printed, or a signal ended the command
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `armd sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        return complain(error)


def complain(error: BaseException) -> int:
    """Print what is wrong and how to mend it, on stderr; the exit status."""
    from pipelines.storage import redacted

    failures: list[BaseException] = [failure for _, failure in getattr(error, "failures", ())] or [error]
    for failure in failures:
        found = user_error_in(failure)
        if found is not None:
            what, fix = found.what, found.fix
        else:
            what = _said(failure)
            fix = "run the command again with --debug for the traceback; if this is a fault of armd, report it"
        print(f"error: {redacted(_one_line(what))}\nfix: {redacted(_one_line(fix))}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def _dispatch(arguments: list[str], *, debug: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        print(HELP.format(commands="\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"armd {_version()}")
        return 0
    command, *rest = arguments
    if command == "run" and rest and debug:  # which then also shows what libraries print
        rest.append("--debug")
    choose(command, COMMANDS, "command", f"`armd --help` lists them: {', '.join(COMMANDS)}")
    status = importlib.import_module(f"jobs.{command}").main(rest)
    return status if isinstance(status, int) else 0


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("armd")
    except metadata.PackageNotFoundError:
        return "from a source tree"


def _said(error: BaseException) -> str:
    """Type and first line of an unexpected error: of what a task raised, where Ray wrapped it."""
    seen: list[BaseException] = []
    while type(error).__module__.startswith("ray.") and error not in seen:
        seen.append(error)
        of_workers = getattr(error, "worker_failures", None)  # Ray Train: {rank: exception}
        inner = next(iter(of_workers.values()), None) if isinstance(of_workers, dict) else None
        inner = inner or getattr(error, "cause", None) or error.__cause__
        if isinstance(inner, BaseException):
            error = inner
    text = _ESCAPES.sub("", str(error)).strip()
    if type(error).__module__.startswith("ray."):  # the exception did not travel, but its traceback did
        if raised := _RAISED.search(text):
            return raised[0]
        if text.startswith("ray::"):
            return text.splitlines()[-1].strip()
    return f"{type(error).__name__}: {(text.splitlines() or ['no message'])[0]}"


def _one_line(text: str) -> str:
    return " ".join(_ESCAPES.sub("", text).split())
