"""What the library says of arguments, said of options."""

import re
from functools import cache
from typing import Any

import typer

# name=value, as in Python: a word, a text, or a list of texts
_ARGUMENT = re.compile(
    r"""\b(?P<name>[a-z_]+)=(?P<value>\[[^\]]*\]|'[^']*'|"[^"]*"|True|False|\w+)"""
)


_apps: list[typer.Typer] = []


def learn(app: typer.Typer) -> None:
    """Let `in_options` know the verbs of an application, and their options."""
    _apps.append(app)


def in_options(text: str) -> str:
    """Return a text in which arguments of Python are spelled as the options that set them.

    `balance='initial'` becomes --balance initial, `symmetric=False` --no-symmetric, `exclude=[...]`
    --exclude. What is no option of a verb stays.
    """

    def spelled(found: re.Match[str]) -> str:
        options, name, value = _options(), found["name"], found["value"]
        option = options.get(name) or options.get(name.removesuffix("s"))
        return _spell(option, value) if option else found[0]

    return _ARGUMENT.sub(spelled, text)


def _spell(option: Any, value: str) -> str:
    flag: str = option.opts[0]
    if value == "False":
        return str(option.secondary_opts[0]) if option.secondary_opts else f"no {flag}"
    if value == "True":
        return flag
    if value == "[]":
        return f"no {flag}"
    values = [part.strip(" '\"") for part in value.strip("[]").split(",")]
    return " ".join(flag if part == "..." else f"{flag} {part}" for part in values)


@cache
def _options() -> dict[str, Any]:
    """Return the options of all verbs by the names of their arguments.

    Of a name that is a plain flag in one verb, and has a --no- in another, it is the latter.
    """
    verbs = [verb for app in _apps for verb in typer.main.get_group(app).commands.values()]
    found = [x for verb in verbs for x in verb.params if x.param_type_name == "option"]
    return {x.name: x for x in sorted(found, key=lambda x: bool(x.secondary_opts))}
