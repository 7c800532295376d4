"""Owns the command `python -m lib`: it reads the arguments, runs one of lib.commands and turns errors into exit codes.

Exit codes: 0 all went well; 1 something failed, or a file got no verdict; 2 the command was not understood; 130 Ctrl-C.
Errors are one line on standard error.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable

from lib import commands
from lib.commands import UsageError

BENCH = ("agreement", "inference", "training", "front-end", "precision", "command", "width", "memory")
"""Parts of benchmarks.bench, named here so that --help needs no torch."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest known option."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message} (see: {self.prog} --help)")

    def checked(self, arguments: list[str] | None) -> argparse.Namespace:
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            options = [name for action in given.parser._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1, cutoff=0.4)
            given.parser.error(f"unknown argument {unknown[0]!r}" + (f"; the nearest known one is {near[0]!r}" if near else ""))
        return given


def parser() -> Parser:
    root = Parser(prog="python -m lib", allow_abbrev=False, description="One-class speech deepfake detection: "
                  "the study, and its detector on your own recordings.")
    choices = root.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(function, text: str) -> Parser:
        one = choices.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        one.set_defaults(run=function, parser=one)
        return one

    def settable(one: Parser) -> None:
        one.add_argument("--set", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help="an option, such as seed=1")

    one = command(commands.study, "run the notebooks in order and write reports/index.html")
    one.add_argument("--preset", default="study", help="smoke, study (default) or paper")
    one.add_argument("--only", action="append", default=[], metavar="NN", help="run this notebook only; may be repeated")
    one.add_argument("--from", dest="start", default="", metavar="NN", help="start at this notebook")
    settable(one)
    one.add_argument("--force", action="store_true", help="run stages again that are unchanged")
    one.add_argument("--plan", action="store_true", help="only say what would run, and its time, memory and disk")
    one = command(commands.train, "train the detectors alone, without notebooks; under `accelerate launch` in several processes")
    one.add_argument("--preset", default="study", help="smoke, study (default) or paper")
    one.add_argument("--experiment", action="append", default=[], choices=["single", "multi"], help="default: both")
    settable(one)
    one = command(commands.verify, "compare the tables of the last run with reports/reference; exit code 1 on any red one")
    one.add_argument("--preset", default="study", help="smoke, study (default) or paper")
    one.add_argument("--reference", metavar="DIR", help="compare with the tables in DIR instead, a copy of another run's reports/tables")
    one = command(commands.pdf, "print reports as PDF through Chromium (Debian: apt-get install chromium)")
    one.add_argument("pages", metavar="PAGE", nargs="*", help="pages (.html); by default the index and every notebook of the last run")
    one.add_argument("--out", metavar="DIR", help="where the PDFs go (default: reports/pdf, or beside each PAGE)")
    _own_recordings(command)
    one = command(commands.evaluate, "error rates of a score file in one of the ASVspoof forms; score up = bona fide")
    one.add_argument("scores", metavar="SCOREFILE")
    one.add_argument("key", metavar="KEYFILE", nargs="?", help="key or protocol; without it the score file's own labels are used")
    one.add_argument("--json", metavar="FILE", help="write every number")
    one.add_argument("--det", metavar="FILE", help="draw the detection error trade-off (.png or .svg)")
    one = command(commands.data, "the clips of a public corpus as one table")
    one.add_argument("--list", action="store_true", help="the corpora that are known, their licence and source")
    one.add_argument("--corpus", metavar="NAME")
    one.add_argument("--root", metavar="DIR", help="the folder into which it was unpacked, or with --download is to be")
    one.add_argument("--check", action="store_true", help="open the header of every file")
    one.add_argument("--out", metavar="FILE", help="write the table (.parquet or .csv)")
    one.add_argument("--download", action="store_true", help="fetch it first, where that is allowed without a form")
    one.add_argument("--part", default="train-clean-100", help="of LibriSpeech, with --download")
    one = command(commands.bench, "ratios of speed, measured in one run")
    one.add_argument("--only", action="append", default=[], metavar="PART", choices=BENCH,
                     help=f"one of {', '.join(BENCH)}; may be repeated")
    one.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    one.add_argument("--csv", metavar="FILE", help="write the table")
    one.add_argument("--figure", metavar="FILE", help="draw how cost grows, from the parts memory and width (.png or .svg)")
    return root


def _own_recordings(command: Callable[..., Parser]) -> None:
    def judging(one: Parser) -> None:
        one.add_argument("--alpha", type=_fraction, default=0.05, help="share of real speech that may be called anomalous (0.05)")
        one.add_argument("--channel", type=int, metavar="N", help="judge this channel, from 0 (default: the mean of all)")
        shared(one)

    def shared(one: Parser) -> None:
        one.add_argument("--detector", metavar="FOLDER", help="a saved detector (default: the one that ships with the project)")

    one = command(commands.score, "judge recordings: consistent with real speech, anomalous or cannot say (exit code 1)")
    one.add_argument("files", metavar="FILE", nargs="*")
    one.add_argument("--folder", action="append", default=[], metavar="DIR", help="every recording below it; may be repeated")
    judging(one)
    one.add_argument("--json", metavar="FILE", help="write every number, in a stable form (schema 1)")
    one.add_argument("--csv", metavar="FILE", help="write one row a recording")
    one.add_argument("--html", metavar="FILE", help="write a page with one row a recording")
    one.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    one.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the networks (fp32); bf16 is faster on processors "
                     "that have it, and slower on others")
    one.add_argument("--manifest", metavar="FILE", help="score a whole corpus instead: a table of `data --out`, or a folder; resumes, and "
                     "runs in several processes under `accelerate launch`")
    one.add_argument("--root", metavar="DIR", help="the folder below which the manifest's paths are")
    one.add_argument("--out", metavar="FILE", help="score file of the manifest, score up = bona fide")
    one.add_argument("--form", default="asvspoof5", choices=["asvspoof2021", "asvspoof5"], help="of that file (asvspoof5)")
    one = command(commands.report, "one page on one recording: player, maps, where it is anomalous; works without a network")
    one.add_argument("file", metavar="FILE")
    one.add_argument("--html", metavar="FILE", required=True)
    judging(one)
    one = command(commands.calibrate, "fit the detector's scaling and p-values to real speech from your own source")
    one.add_argument("speech", metavar="DIR_OR_FILE", nargs="+", help="real speech, about four minutes or more")
    one.add_argument("--out", metavar="FOLDER", required=True, help="where the calibrated detector is saved")
    shared(one)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, not {text!r}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        given = parser().checked(arguments)
        return given.run(given)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001  every message of the library is written for the user
        from lib.settings import SettingsError

        if not isinstance(error, RuntimeError | ValueError | OSError | AssertionError | ImportError):
            raise
        print(f"error: {' '.join(str(error).split(chr(10))) or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
