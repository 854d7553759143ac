"""The commands that take no config file, for the command line: what each takes, and how it is called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastdpo.commands.demo import FOLDER, demo
from fastdpo.commands.doctor.doctor import doctor
from fastdpo.commands.merge.merge import OPTIONS, merge
from fastdpo.settings.config_file import UsageError
from fastdpo.settings.fields import Setting
from fastdpo.settings.flags import overrides_of, settings_help


class Tool(NamedTuple):
    """A command that takes no config file."""

    run: Callable[[Any, dict[str, Any]], Path | None]
    """Called with the first word behind the command's name, or None, and with the options; the config to train next."""
    takes: str
    """The words behind the command's name, as the help shows them."""
    about: str
    """What that first word is, in a sentence."""
    options: dict[str, Setting]

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]


TOOLS = {
    "demo": Tool(demo, "[FOLDER]", f"FOLDER is a new or empty folder for the example (default: {FOLDER}).", {}),
    "merge": Tool(
        merge,
        "ADAPTER --output_dir FOLDER [--model_name_or_path MODEL]",
        "ADAPTER is the folder of the adapter.",
        OPTIONS,
    ),
    "doctor": Tool(
        doctor,
        "[MODEL]",
        "MODEL is a folder or a name on the Hub; the training of that model is described too (default: none).",
        {},
    ),
}


def run_tool(command: str, rest: list[str], end_of_help: str, show: Callable[[str], None]) -> Path | None:
    """Run a command of `TOOLS` with the words behind its name, or show its help if they ask for it.

    A path that is returned is a config to train now.

    Raises:
        UsageError: a word is missing, or an option does not exist.
    """
    tool = TOOLS[command]
    if "-h" in rest or "--help" in rest:
        show(
            settings_help(
                command, f"{tool.summary}\n\n{tool.about}", tool.options, end_of_help, takes=tool.takes, shared={}
            )
        )
        return None
    first = rest[0] if rest and not rest[0].startswith("-") else None
    if first is None and not tool.takes.startswith("["):
        raise UsageError(f"{tool.takes.partition(' ')[0]} must come first: fastdpo {command} {tool.takes}")
    options = overrides_of(rest if first is None else rest[1:], tool.options, {})
    for name, option in tool.options.items():
        if option.default is None and name not in options:
            raise UsageError(f"--{name} is missing: fastdpo {command} {tool.takes}")
    return tool.run(first, options)
