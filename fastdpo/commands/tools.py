"""The commands that take no config file, for the command line: what each takes, and how it is called."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fastdpo.commands.doctor import doctor
from fastdpo.commands.merge import OPTIONS, merge
from fastdpo.settings.config_file import UsageError
from fastdpo.settings.fields import Setting
from fastdpo.settings.flags import overrides_of, settings_help


class Tool(NamedTuple):
    """A command that takes no config file."""

    run: Callable[[Any, dict[str, Any]], None]
    """Called with the first word behind the command's name, or None, and with the options."""
    takes: str
    """The words behind the command's name, as the help shows them."""
    options: dict[str, Setting]

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]


TOOLS = {
    "merge": Tool(merge, "ADAPTER --output_dir FOLDER [--model_name_or_path MODEL]", OPTIONS),
    "doctor": Tool(doctor, "[MODEL]", {}),
}


def run_tool(command: str, rest: list[str], end_of_help: str) -> str | None:
    """Run a command of `TOOLS` with the words behind its name; return its help instead if they ask for it.

    Raises:
        UsageError: a word is missing, or an option does not exist.
    """
    tool = TOOLS[command]
    if "-h" in rest or "--help" in rest:
        return settings_help(command, tool.summary, tool.options, end_of_help, takes=tool.takes, shared={})
    first = rest[0] if rest and not rest[0].startswith("-") else None
    if first is None and not tool.takes.startswith("["):
        raise UsageError(f"{tool.takes.partition(' ')[0]} must come first: fastdpo {command} {tool.takes}")
    options = overrides_of(rest if first is None else rest[1:], tool.options, {})
    for name, option in tool.options.items():
        if option.default is None and name not in options:
            raise UsageError(f"--{name} is missing: fastdpo {command} {tool.takes}")
    tool.run(first, options)
    return None
