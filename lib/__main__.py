"""Owns the way into the command `python -m lib`: arguments, checked before any work, and errors as exit codes.

Exit codes: 0 all went well; 1 something failed, or a file got no verdict; 2 the command was not understood; 130 Ctrl-C.
Errors are one line on standard error.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from lib.cli import COMMANDS, Input, Output, OutputFolder
from lib.paths import UsageError, require_outputs


class Once(argparse._StoreAction):
    """An option's value; a second one would go unseen, and is an error."""

    def __call__(self, reader: argparse.ArgumentParser, chosen: argparse.Namespace, value: object,
                 name: str | None = None) -> None:
        if name and name in (given := vars(chosen).setdefault("given", [])):
            reader.error(f"{name} is given twice")
        given.append(name) if name else None
        super().__call__(reader, chosen, value, name)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest known option."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.register("action", None, Once)

    def error(self, message: str) -> None:
        raise UsageError(f"{message} (see: {self.prog} --help)")

    def checked(self, arguments: list[str] | None) -> argparse.Namespace:
        """The arguments as a namespace, whose outputs can be written. Raises UsageError."""
        chosen, unknown = self.parse_known_args(arguments)
        for action in chosen.parser._actions:
            if not action.option_strings and action.nargs in ("*", "+"):  # more files may follow the options
                getattr(chosen, action.dest).extend(Input(each) for each in unknown if not each.startswith("-"))
                unknown = [each for each in unknown if each.startswith("-")]
        if unknown and Path(unknown[0]).exists():
            chosen.parser.error(f"unknown argument {unknown[0]!r}; the file of this name is ./{unknown[0]}")
        if unknown:
            options = [name for action in chosen.parser._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1, cutoff=0.4)
            hint = f"; the nearest known one is {near[0]!r}" if near else ""
            chosen.parser.error(f"unknown argument {unknown[0]!r}{hint}")
        for names, only, without, endings, details in COMMANDS[chosen.command][2]:
            value = getattr(chosen, details.get("dest") or names[0].lstrip("-"))
            if value not in (None, [], False, ""):
                name = names[0] if names[0].startswith("-") else details["metavar"]
                if only and not getattr(chosen, only):
                    chosen.parser.error(f"{name} goes with --{only}")
                if without and getattr(chosen, without, None):
                    chosen.parser.error(f"{name} does not go with --{without}")
                if not str(value).endswith(endings):
                    chosen.parser.error(f"{name}: expected a name in {' or '.join(endings)}, not {value!r}")
        values = [each for value in vars(chosen).values() for each in (value if isinstance(value, list) else [value])]
        kinds = (Input, Output, OutputFolder)
        if any(isinstance(value, kinds) and not value for value in values):
            chosen.parser.error("a name is empty")
        inputs, files, folders = ([value for value in values if isinstance(value, kind)] for kind in kinds)
        require_outputs(files, inputs)
        require_outputs(folders, inputs, folders=True)
        return chosen


def parser() -> Parser:
    root = Parser(prog="python -m lib", allow_abbrev=False, description="One-class speech deepfake detection: "
                  "the study, and its detector on your own recordings.")
    choices = root.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (_, text, options, _) in COMMANDS.items():
        each = choices.add_parser(name, help=text, description=text, allow_abbrev=False)
        each.set_defaults(parser=each)
        for names, *_, details in options:
            each.add_argument(*names, **details)
    return root


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter ends no batch
    kept = "nothing was written"
    try:
        chosen = parser().checked(arguments)
        run, _, _, kept = COMMANDS[chosen.command]
        return run(chosen)
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C; {kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except Exception as error:  # noqa: BLE001  every message of the library is written for the user
        if not isinstance(error, RuntimeError | ValueError | OSError | AssertionError | ImportError):
            raise
        text = " ".join(str(error).splitlines()) or type(error).__name__
        if isinstance(error, UnicodeEncodeError):
            text = "a name that is no valid text: rename the file, or link to it"
        print(f"error: {text}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    raise SystemExit(main())
