"""Owns the commands of `python -m lib`, each with its options beside what it does; lib/__main__.py reads the arguments.
What a command needs is imported when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from lib import paths
from lib.paths import NOTEBOOKS, REFERENCE, REPORTS, Input, Output, OutputFolder, UsageError, atomic, whole
from lib.settings import ROLES, checked_alpha, load_settings, parse_options

COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, tuple, str]] = {}
ALPHA = 0.05



def option(*names: str, only: str = "", without: str = "", endings: tuple = ("",), **details: object) -> tuple:
    """An option as argparse takes it, which goes `only` with another one, or `without` it; its text has an ending."""
    return names, only, without, endings, details


def command(text: str, *options: tuple, kept: str = "nothing was written") -> Callable[[Callable], Callable]:
    """Registers a function as a command; `kept` is what Ctrl-C leaves."""
    def registered(function: Callable) -> Callable:
        COMMANDS[function.__name__] = function, text, options, kept
        return function
    return registered


PRESET = option("--preset", default="study", help="smoke, study (default), full or paper")
SET = option("--set", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help="an option, such as seed=1")
DETECTOR = option("--detector", type=Input, metavar="FOLDER", help="a saved detector (default: the one that ships)")
CHANNEL = option("--channel", without="manifest", type=whole(0), metavar="N", help="judge this one, from 0 (the mean)")
SHARE = option("--alpha", without="manifest", help=f"share of real speech that may be called anomalous ({ALPHA})")


def _settings(chosen: argparse.Namespace):
    from lib.data.public import roles_of

    changes = parse_options(chosen.set)
    settings = load_settings(chosen.preset, 0, changes)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", settings.run.device):
        raise UsageError(f"option 'run.device' is auto, cpu, cuda, cuda:1 or mps, not {settings.run.device!r}")
    for role in roles_of(sum((settings.options()[name] for name in ROLES), ())):
        if role.folder and not Path(role.folder).exists():
            raise UsageError(f"expected the folder of {role.corpus}, found nothing at {role.folder}")
    return settings, changes


@command("run the notebooks in order and write reports/index.html", PRESET, SET,
         option("--only", action="append", default=[], metavar="NN", help="run this notebook only; may be repeated"),
         option("--from", without="only", dest="start", default="", metavar="NN", help="start at this notebook"),
         option("--force", without="plan", action="store_true", help="run stages again that are unchanged"),
         option("--plan", action="store_true", help="only say what would run, its time and its disk"),
         option("--pdf", without="plan", action="store_true", help="print the pages into reports/pdf too, by Chromium"),
         kept="finished notebooks are kept: run the same command again to go on")
def study(chosen: argparse.Namespace) -> int:
    from lib.report.run import planned, require_disk, run_study

    settings, changes = _settings(chosen)
    only = tuple(number for item in chosen.only for number in item.split(","))
    if chosen.plan:
        print("\n".join(planned(settings, only, chosen.start)))
    require_disk(settings)
    if not chosen.plan:
        run_study(settings, changes, only, chosen.start, chosen.force, say=lambda text: print(text, flush=True))
    if chosen.pdf:
        from lib.report.html import print_reports

        print_reports(REPORTS)
    return 0


@command("train the detectors alone, without notebooks; under `accelerate launch` in several processes", PRESET, SET,
         option("--experiment", action="append", default=[], choices=["single", "multi"], help="default: both"),
         kept="the last checkpoints are kept: run the same command again to go on")
def train(chosen: argparse.Namespace) -> int:
    from lib.model.training import engine_of
    from lib.report.run import require_disk
    from lib.study import Study

    settings, _ = _settings(chosen)
    engine, experiments = engine_of(settings), chosen.experiment or ["single", "multi"]
    sys.stdout = sys.stdout if engine.main else open(os.devnull, "w")  # the main process speaks for all
    study = Study(settings)
    with engine.main_first():
        if engine.main:
            require_disk(settings)
        print(f"{len(study.clips)} clips; training on {engine.device} in {engine.world} process(es)", flush=True)
    for name in experiments:
        study.student(name)
    for name in experiments if engine.main else []:
        print(f"{name}: {study.folder / 'detectors'}/{name}-{study.detector(name).key}")
    engine.wait()
    return 0


@command("compare the tables of the last run with reports/reference; exit code 1 on any red one", PRESET,
         option("--reference", type=Input, metavar="DIR", help="compare with a copy of another run's reports/tables"),
         option("--scores", without="reference", action="store_true",
                help="instead, rebuild the reference run's tables from its score files"))
def verify(chosen: argparse.Namespace) -> int:
    if chosen.scores:
        from lib.audit.operating_points import TABLES
        from lib.evaluate import results

        gaps = results.recheck(REFERENCE / "scores", REFERENCE / "full", results.TABLES | TABLES)
        rows = [(name, "red" if gap > 1e-6 else "green", f"largest difference {gap:.1g}") for name, gap in gaps]
    else:
        from lib.report import exhibits

        rows = exhibits.verify(load_settings(chosen.preset).preset, chosen.reference)
    codes = {"green": 32, "amber": 33, "red": 31}
    for table, colour, why in rows:
        print(f"\033[{codes[colour]}m{colour:5s}\033[0m" if sys.stdout.isatty() else f"{colour:5s}", f" {table}: {why}")
    counts = {name: sum(colour == name for _, colour, _ in rows) for name in codes}
    print(f"{len(rows)} tables: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    return 1 if counts["red"] else 0


@command("judge recordings: consistent with real speech, anomalous or cannot say (exit code 1)",
         option("files", without="manifest", type=Input, metavar="FILE", nargs="*"),
         option("--folder", without="manifest", type=Input, action="append", default=[], metavar="DIR",
                help="every recording below it"),
         SHARE, CHANNEL, DETECTOR,
         option("--json", without="manifest", type=Output, metavar="FILE", help="write every number (schema 2)"),
         option("--csv", without="manifest", type=Output, metavar="FILE", help="write one row a recording"),
         option("--html", without="manifest", type=Output, metavar="FILE", help="write a page with a row a recording"),
         option("--jobs", without="manifest", type=whole(1), metavar="N", help="processes (1)"),
         option("--precision", without="manifest", choices=["fp32", "bf16"], help="of the networks (fp32)"),
         option("--manifest", type=Input, metavar="FILE", help="score a corpus instead: a table of `data --out`, or a "
                "folder; resumes, and runs in several processes under `accelerate launch`"),
         option("--root", only="manifest", type=Input, metavar="DIR", help="the folder below which its paths are"),
         option("--out", only="manifest", type=Output, metavar="FILE", help="its score file, score up = bona fide"),
         option("--form", only="manifest", choices=["asvspoof2021", "asvspoof5"], help="of that file (asvspoof5)"),
         kept="finished blocks of a --manifest are kept: run the same command again to go on")
def score(chosen: argparse.Namespace) -> int:
    if chosen.manifest:
        return _score_manifest(chosen)
    if not chosen.files and not chosen.folder:
        raise UsageError("name a FILE or a --folder")
    from lib.recordings import corpus, explaining, judging

    alpha, precision = checked_alpha(chosen.alpha or ALPHA), chosen.precision or "fp32"
    named, left_out = corpus.listed(chosen.files, chosen.folder)
    outputs = list(filter(None, (chosen.json, chosen.csv, chosen.html)))
    paths.require_outputs(outputs, named)
    paths.tell("left out", left_out)
    names, recordings = judging.load_detector(chosen.detector, precision)[2], []
    try:
        for recording in corpus.judged_all(named, chosen.detector, alpha, chosen.jobs or 1, chosen.channel, precision):
            recordings.append(recording)
            print(recording.line, *recording.warnings, sep="\n    note: ", flush=True)
    except KeyboardInterrupt:
        kept = ", ".join(outputs) if recordings else ""
        print(f"stopped by Ctrl-C after {len(recordings)} of {len(named)} recordings"
              + (f", which are kept in {kept}" if kept else "; nothing was written"), file=sys.stderr)
    complete = len(recordings) == len(named)
    table = explaining.as_table(recordings) if chosen.csv or chosen.html else None
    if chosen.json and recordings:
        paths.write_json(chosen.json, explaining.as_json(recordings, names, alpha, left_out, complete))
    if chosen.csv and recordings:
        explaining.write_csv(table, chosen.csv)
    if chosen.html and recordings:
        from lib.report.html import write_table

        table = table[["verdict", "path", "p_value", "says", "why", "seconds", "warnings"]]
        write_table(Path(chosen.html), table, "Recordings", f"{len(table)} recordings, alpha {alpha:g}", names)
    return 130 if not complete else 1 if any(each.verdict == judging.UNKNOWN for each in recordings) else 0


def _score_manifest(chosen: argparse.Namespace) -> int:
    from lib.engine import current
    from lib.recordings import corpus

    if not chosen.out:
        raise UsageError("--manifest needs --out, the score file to write")
    table = corpus.read_manifest(chosen.manifest, chosen.root)
    paths.require_outputs([chosen.out, f"{chosen.out}.unscored.csv"], [chosen.manifest, *table.path])
    results = corpus.score_manifest(table, chosen.out, current("cpu"), chosen.detector, chosen.form or "asvspoof5")
    if results is None:
        return 0  # the main process speaks for all
    left = int(results.anomaly.isna().sum())
    rest = f", {left} could not be: {chosen.out}.unscored.csv" if left else ""
    print(f"{chosen.out}: {len(results) - left} clips scored{rest}")
    return 1 if left else 0


@command("one page on one recording: player, maps, where it is unusual; works without a network",
         option("file", type=Input, metavar="FILE"),
         option("--html", type=Output, metavar="FILE", help="the page (default: FILE's name with .report.html)"),
         SHARE, CHANNEL, DETECTOR)
def report(chosen: argparse.Namespace) -> int:
    from lib.report.run import run_notebook

    if chosen.detector and not Path(chosen.detector, "detector.json").exists():
        raise ValueError(f"{chosen.detector}: expected the folder of a saved detector, found no detector.json in it")
    page = chosen.html or f"{Path(chosen.file).stem}.report.html"
    paths.require_outputs([page], [chosen.file])
    parameters = {"recording": os.path.abspath(chosen.file), "alpha": checked_alpha(chosen.alpha or ALPHA),
                  "detector": os.path.abspath(chosen.detector) if chosen.detector else "",
                  "channel": -1 if chosen.channel is None else chosen.channel}
    finding = run_notebook(NOTEBOOKS / "90_score_your_recording.ipynb", parameters, Path(page))
    print(f"{chosen.file}: {finding}\n{page} written")
    return 1 if finding.startswith("cannot say") else 0


@command("fit the detector's scaling and p-values to real speech of your own source, or of one person",
         option("speech", type=Input, metavar="DIR_OR_FILE", nargs="+", help="real speech, about four minutes or more"),
         option("--out", type=OutputFolder, metavar="FOLDER", required=True, help="where the new detector is saved"),
         option("--name", default="", metavar="TEXT", help="whose speech it is, or from where; kept with the detector"),
         DETECTOR)
def calibrate(chosen: argparse.Namespace) -> int:
    from lib.recordings import corpus

    folders = [name for name in chosen.speech if Path(name).is_dir()]
    named, left_out = corpus.listed([name for name in chosen.speech if name not in folders], folders, there=True)
    result = corpus.calibrate(named, chosen.out, chosen.detector, chosen.name)
    paths.tell("left out", result.left_out + left_out)
    names, whose = result.names, f" of {chosen.name}" if chosen.name else ""
    print(f"{chosen.out}: calibrated on {names['recordings']} recordings, {names['speech_s'] / 60:.1f} min of speech"
          f"{whose}; compares with {names['calibration_clips']} others, so for alpha {names['smallest_alpha']:.3f} or "
          f"more; use it with --detector {chosen.out}")
    if names["smallest_alpha"] > ALPHA:
        result.notes.append((f"alpha {ALPHA}", "needs 19 of them, about four minutes of speech"))
    paths.tell("note", result.notes)
    return 1 if result.left_out else 0


@command("error rates of a score file in one of the ASVspoof forms; score up = bona fide",
         option("scores", type=Input, metavar="SCOREFILE"),
         option("key", type=Input, metavar="KEYFILE", nargs="?", help="default: the labels of the score file itself"),
         option("--manifest", type=Input, metavar="FILE", help="path, label, corpus of each: AUC, found, false alarms"),
         option("--json", type=Output, metavar="FILE", help="write every number"),
         option("--det", type=Output, endings=(".png", ".svg"), metavar="FILE", help="draw the error trade-off"))
def evaluate(chosen: argparse.Namespace) -> int:
    import pandas as pd

    from lib.evaluate import results

    if chosen.manifest:
        from lib.evaluate.systems import outside_text

        print(outside_text(Path(chosen.scores), Path(chosen.manifest)))
        return 0
    numbers = results.evaluate(chosen.scores, chosen.key)
    for text in numbers["warnings"]:
        print(f"warning: {text}", file=sys.stderr)
    print(f"{numbers['bonafide']} bonafide, {numbers['spoof']} spoof clips; score up = bona fide")
    print(f"EER {numbers['eer']:.4%}  AUC {numbers['auc']:.4f}  min DCF {numbers['min_dcf']:.4f}  act DCF "
          f"{numbers['act_dcf']:.4f}  CLLR {numbers['cllr']:.4f} bits")
    for row in numbers["attacks"]:
        print(f"  {row['attack'] or '(unnamed)':24s} {row['spoof']:7d} spoof  EER {row['eer']:8.4%}  "
              f"AUC {row['auc']:.4f}  min DCF {row['min_dcf']:.4f}")
    if chosen.json:  # by pandas, which writes null for what is no number
        paths.write_text(chosen.json, pd.Series({"schema": 1, **numbers}).to_json(indent=1, double_precision=15) + "\n")
    if chosen.det:
        results.write_det(chosen.scores, chosen.key, chosen.det)
    return 0


@command("the clips of a public corpus as one table",
         option("--list", action="store_true", help="the corpora that are known, their licence and source"),
         option("--corpus", without="list", metavar="NAME"),
         option("--root", without="list", type=Input, metavar="DIR", help="where it is, or with --download is to be"),
         option("--check", without="list", action="store_true", help="open the header of every file"),
         option("--out", without="list", type=Output, endings=(".parquet", ".csv"), metavar="FILE", help="the table"),
         option("--download", without="list", action="store_true", help="fetch it first, where that needs no form"),
         option("--part", only="download", help="of LibriSpeech (train-clean-100)"))
def data(chosen: argparse.Namespace) -> int:
    import warnings

    from lib.data.public import DATASETS, download_dataset, load_dataset

    if chosen.list:
        for corpus in DATASETS.values():
            lines = [f"{corpus.title}; licence: {corpus.licence}", f"from {corpus.source}", corpus.caution]
            print(f"{corpus.name:16s}", ("\n" + 17 * " ").join(filter(None, lines)))
        return 0
    if not chosen.corpus or not chosen.root:
        raise UsageError("name a --corpus and its --root, or ask for --list")
    if chosen.out and Path(chosen.out).exists() and Path(chosen.root).resolve() in Path(chosen.out).resolve().parents:
        raise UsageError(f"{chosen.out} is there already, inside the corpus: name a new file")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    part = chosen.part or "train-clean-100"
    root = download_dataset(chosen.corpus, chosen.root, part) if chosen.download else chosen.root
    table = load_dataset(chosen.corpus, root, chosen.check)
    print(f"{chosen.corpus}: {len(table)} clips below {table.attrs['root']}, release {table.attrs['release']}")
    print(table.groupby(["split", "label"]).size().to_string())
    hours = f"{table.seconds.sum() / 3600:.2f} h, rates {sorted(table.rate_hz.unique().tolist())} Hz\n" * chosen.check
    print(hours, f"note: {table.attrs['caution']}\n" * bool(table.attrs["caution"]), sep="", end="")
    if chosen.out:
        with atomic(chosen.out) as temporary:
            table.to_parquet(temporary) if chosen.out.endswith(".parquet") else table.to_csv(temporary, index=False)
    return 0
