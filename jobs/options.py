"""Command lines into frozen dataclasses, through tyro; a mistake is one line what and one line how to mend it.

Nested fields become dotted options (`--train.steps`), the string under a field its help. tyro tells of a mistake
through `tyro._errors`, which it calls unstable: constraints.txt pins tyro, and tests/test_bad_input.py sees every kind
of event.
"""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pipelines.errors import UserError

Options = TypeVar("Options")


class UsageError(UserError):
    """A command line that means nothing: exit status 2."""


def parse(default: Options, arguments: Sequence[str], *, command: str, description: str) -> Options:
    """`default` with what `arguments` change; `--help` prints the help and exits.

    Args:
        default: a frozen dataclass; fields without a default in it are `tyro.MISSING`.
        arguments: what stands after the command.
        command: the command for messages and help, such as "armd run demo".
        description: the help's first lines; its line breaks are kept.

    Raises:
        UsageError: an unknown option (the nearest one is named), a value of the wrong kind or out of range.
    """
    import tyro
    from tyro import _errors

    known = defaults(default)

    def refuse(event: _errors.ParseErrorEvent) -> None:
        what, fix = _explain(event, known, arguments)
        raise UsageError(what, fix or f"`{command} --help` lists the options")

    # tyro hands most complaints of a dataclass to the hook, but lets those of a hoisted one through.
    with naming_options(default, arguments, command=command), _errors.on_parse_error(refuse):
        return tyro.cli(
            type(default),
            default=default,
            args=list(arguments),
            prog=command,
            description=re.sub(r"\n+", "\n  ", description),  # tyro joins lines, but not those that are indented
            config=(tyro.conf.FlagCreatePairsOff,),
        )


@contextlib.contextmanager
def naming_options(default: Any, arguments: Sequence[str], *, command: str) -> Iterator[None]:
    """Turns a `ValueError` about a value into a `UsageError` that names the option.

    Raises:
        UsageError: instead of the ValueError.
    """
    try:
        yield
    except ValueError as error:
        what, fix = _about_value(str(error), defaults(default), arguments)
        raise UsageError(what, fix or f"`{command} --help` lists the options") from error


def defaults(config: Any, prefix: str = "--") -> dict[str, Any]:
    """The values of a dataclass instance by option as it is typed, nested ones dotted; positional ones are left out."""
    from tyro.conf import Positional

    (positional,) = Positional[str].__metadata__  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        marks = getattr(field.type, "__metadata__", ())
        hoisted = any(getattr(mark, "name", None) == "" for mark in marks)
        name = prefix if hoisted else f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            found |= defaults(value, prefix if hoisted else f"{name}.")
        elif positional not in marks:
            found[name] = value
    return found


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The entry of `words` that `word` is most likely a slip of; None when none is near."""
    words = list(words)
    bare = {entry.lstrip("-"): entry for entry in words}  # dashes, which all options share, are no likeness
    found = [bare[one] for one in difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.6)]
    if not found:  # `--steps` for `--train.steps`
        tail = word.lstrip("-").rpartition(".")[2]
        found = [entry for entry in words if tail and entry.rpartition(".")[2].lstrip("-") == tail]
    return found[0] if found else None


def choose(word: str, words: Iterable[str], kind: str, fix: str) -> None:
    """Check that `word` is one of `words`.

    Raises:
        UsageError: it is not; the nearest one is offered, else `fix`.
    """
    words = list(words)
    if word not in words:
        near = nearest(word, words)
        raise UsageError(f"there is no {kind} '{word}'", f"did you mean '{near}'? {fix}" if near else fix)


def _explain(event: Any, known: Mapping[str, Any], arguments: Sequence[str]) -> tuple[str, str | None]:
    """What is wrong and how to mend it; None leaves the mend to the caller."""
    from tyro import _errors

    if isinstance(event, _errors.UnrecognizedArgs):
        option = next((token for token in event.tokens if token.startswith("-")), None)
        if option is None:
            return f"unexpected argument '{event.tokens[0]}'", None
        near = nearest(option.partition("=")[0].replace("_", "-"), known)
        return f"there is no option {option.partition('=')[0]}", f"did you mean {near}?" if near else None
    if isinstance(event, _errors.InvalidChoice):
        near = nearest(event.value, event.choices)
        fix = f"it takes one of: {', '.join(event.choices)}"
        return f"{_name(event.argument)} cannot be '{event.value}'", f"did you mean '{near}'? {fix}" if near else fix
    if isinstance(event, _errors.BadValue):
        return f"{_name(event.argument)} needs {_values(event.argument)}", f"write {_invocation(event.argument)}"
    if isinstance(event, _errors.MissingArgs):
        missing = [argument.arg for argument in event.missing_arguments]
        return f"{' and '.join(map(_name, missing))} is missing", None
    if isinstance(event, _errors.InstantiationFailure):
        if event.argument is not None:
            return _bad_value(event, arguments), f"write {_invocation(event.argument)}"
        return _about_value(event.message, known, arguments)
    return f"the command line was not understood ({type(event).__name__})", None


def _about_value(message: str, known: Mapping[str, Any], arguments: Sequence[str]) -> tuple[str, str | None]:
    option = _option_in(message, list(known), arguments)
    if option is None:
        return message, None
    field = option.rpartition(".")[2].lstrip("-").replace("-", "_")
    about_it = message.startswith(field)
    what = option + message[len(field) :] if about_it else f"{option}: {message}"
    bound = re.search(r" must (?:be|name) (.+?)(?:, not .*)?$", message) if about_it else None
    default = _typed(known[option])
    if option not in _typed_options(arguments):  # its default does not go with something that was typed
        return what, f"change {option}, whose default is {default}, or what it has to go with"
    other = f"choose what fits: {bound[1]}" if bound else "change what it has to go with"
    return what, f"leave {option} at its default, {default}, or {other}"


def _typed(value: Any) -> str:
    """A default as it would be typed; an empty list is typed as nothing."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(_typed, value)) or "nothing"
    return str(value) if value != "" else "''"


def _option_in(message: str, known: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The option whose field a configuration's message names; one that was typed goes first."""
    words = {word.strip("'\",.:;()").replace("_", "-") for word in message.split()}
    for option in [*(name for name in _typed_options(arguments) if name in known), *known]:
        if option.rpartition(".")[2].lstrip("-") in words:
            return option
    return None


def _typed_options(arguments: Sequence[str]) -> list[str]:
    return [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]


def _bad_value(event: Any, arguments: Sequence[str]) -> str:
    """`--train.steps cannot be 'abc'`, from what was typed after the option."""
    name = _name(event.argument)
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") == name:
            typed = [value] if equals else list(arguments[place + 1 : place + 2])
            return f"{name} cannot be '{typed[0]}'" if typed else f"{name}: {event.message}"
    return f"{name}: {event.message}"


def _name(argument: Any) -> str:
    return str(argument.lowered.metavar if argument.is_positional() else argument.lowered.name_or_flags[-1])


def _values(argument: Any) -> str:
    count = argument.lowered.nargs
    return "a value" if count == 1 else f"{count} values"


def _invocation(argument: Any) -> str:
    metavar = str(argument.lowered.metavar)
    return metavar if argument.is_positional() else f"{_name(argument)} {metavar}"
