"""Owns what each subcommand does: call the library, print what it found, return the exit code. Imports wait until needed."""

from __future__ import annotations

import argparse
import sys


class UsageError(ValueError):
    """The command was not understood."""


# --- the study --------------------------------------------------------------------------------------------------------------


def _settings(given: argparse.Namespace):
    from lib.settings import SettingsError, load_settings, parse_options

    # A list of names is joined by plus signs, because commas part the options that a notebook is given.
    changes = {name: value.replace(",", "+") for name, value in parse_options(given.set).items()}
    if "preset" in changes:
        raise SettingsError("the preset is chosen with --preset, not with --set")
    return load_settings(given.preset, 0, changes), changes


def study(given: argparse.Namespace) -> int:
    from lib.report.plan import planned
    from lib.report.run import run_study

    settings, changes = _settings(given)
    only = tuple(number for item in given.only for number in item.split(","))
    plan = planned(settings, only, given.start)
    if given.plan:
        print("\n".join(plan.lines()))
    plan.require_disk()
    if not given.plan:
        run_study(settings, changes, only, given.start, given.force, say=lambda text: print(text, flush=True))
    return 0


def train(given: argparse.Namespace) -> int:
    import contextlib
    import os

    from lib.model.training import engine_of
    from lib.report.plan import planned
    from lib.study import Study

    settings, _ = _settings(given)
    engine = engine_of(settings)
    with contextlib.ExitStack() as stack:
        if not engine.main:  # the main process speaks for all
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        study = Study(settings)
        with engine.main_first():
            if engine.main:
                planned(settings).require_disk()
            clips = len(study.clips)
        print(f"{clips} clips; training on {engine.device} in {engine.world} process{'es' if engine.world > 1 else ''}", flush=True)
        experiments = given.experiment or ["single", "multi"]
        for name in experiments:
            study.student(name)
        if engine.main:
            for name in experiments:
                detector = study.detector(name)
                print(f"{name}: {study.folder / 'detectors'}/{name}-{detector.key}")
        engine.wait()
    return 0


def verify(given: argparse.Namespace) -> int:
    from lib.report.run import verify as compared
    from lib.settings import load_settings

    rows = compared(load_settings(given.preset).preset, given.reference)
    codes = {"green": 32, "amber": 33, "red": 31}
    for table, colour, why in rows:
        shown = f"\033[{codes[colour]}m{colour:5s}\033[0m" if sys.stdout.isatty() else f"{colour:5s}"
        print(f"{shown}  {table}: {why}")
    counts = {name: sum(colour == name for _, colour, _ in rows) for name in codes}
    print(f"{len(rows)} tables: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 1 if counts["red"] else 0


def pdf(given: argparse.Namespace) -> int:
    from pathlib import Path

    from lib.paths import REPORTS
    from lib.report.browser import Browser

    pages = [Path(name) for name in given.pages] or [REPORTS / "index.html", *sorted((REPORTS / "html").glob("*.html"))]
    folder = Path(given.out) if given.out else None
    if len({page.stem for page in pages}) < len(pages) and folder:
        raise UsageError(f"two pages of one name cannot both go to {folder}")
    with Browser() as browser:
        for page in pages:
            target = (folder or (REPORTS / "pdf" if not given.pages else page.parent)) / f"{page.stem}.pdf"
            target.parent.mkdir(parents=True, exist_ok=True)
            browser.pdf(page, target)
            print(f"{target}: {target.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0


# --- your own recordings ----------------------------------------------------------------------------------------------------


def _score_manifest(given: argparse.Namespace) -> int:
    from lib.engine import current
    from lib.recordings.corpus import read_manifest, score_manifest

    others = (given.files, given.folder, given.json, given.csv, given.html, given.channel is not None, given.jobs != 1,
              given.precision != "fp32")
    if not given.out or any(others):
        raise UsageError("--manifest takes --out, --root, --form and --detector, and no files or other outputs; for several processes "
                         "start it with `accelerate launch`")
    engine, table = current("cpu"), read_manifest(given.manifest, given.root)

    def progress(done: int, blocks: int) -> None:
        if engine.main and (done * 10 // blocks != (done - 1) * 10 // blocks):
            print(f"{done}/{blocks} blocks", flush=True)

    found = score_manifest(table, given.out, engine, given.detector, given.form, progress)
    if found is None:
        return 0
    left = int(found.anomaly.isna().sum())
    print(f"{given.out}: {len(found) - left} clips scored" + (f", {left} could not be: {given.out}.unscored.csv" if left else ""))
    return 1 if left else 0


def score(given: argparse.Namespace) -> int:
    if given.manifest:
        return _score_manifest(given)
    from lib.recordings.judging import audio_files, judged_all, load_detector
    from lib.recordings.verdicts import UNKNOWN, as_json

    paths = given.files + [path for folder in given.folder for path in audio_files(folder)]
    if not paths:
        raise UsageError("name a FILE or a --folder")
    names = load_detector(given.detector)[2] | {"precision": given.precision}
    from tqdm import tqdm

    found = []
    stream = judged_all(paths, given.detector, given.alpha, given.jobs, given.channel, given.precision)
    for one in tqdm(stream, total=len(paths), unit="file", leave=False, disable=not sys.stderr.isatty() or len(paths) < 2):
        found.append(one)
        numbers = "" if one.p_value is None else f"  p {one.p_value:.3f}  anomaly {one.anomaly:.2f}  {one.seconds:.1f} s"
        with tqdm.external_write_mode(sys.stdout):
            print(f"{one.path}: {one.words}{numbers}")
            for note in one.warnings:
                print(f"    note: {note}")
    if given.json:
        from lib.paths import write_json

        write_json(given.json, as_json(found, names, given.alpha))
    if given.csv:
        _write_csv(given.csv, found)
    if given.html:
        from lib.recordings.explaining import write_table

        write_table(found, given.html, f"{len(found)} recordings, alpha {given.alpha:g}.", names)
    return 1 if any(one.verdict == UNKNOWN for one in found) else 0


def _write_csv(path: str, found: list) -> None:
    """One row a recording; the warnings are joined, the parts left out."""
    import csv
    import dataclasses

    from lib.paths import atomic

    rows = [dataclasses.asdict(one) | {"warnings": "; ".join(one.warnings)} for one in found]
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "parts"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def report(given: argparse.Namespace) -> int:
    from lib.detector import SHIPPED
    from lib.recordings.explaining import write_report
    from lib.recordings.figures import read_known
    from lib.recordings.judging import load_detector
    from lib.recordings.verdicts import UNKNOWN

    detector, limits, names = load_detector(given.detector)
    one = write_report(detector, given.file, given.html, limits, given.alpha, names | {"alpha": given.alpha}, given.channel,
                       read_known(given.detector or SHIPPED))
    print(f"{one.path}: {one.words}\n{given.html} written")
    return 1 if one.verdict == UNKNOWN else 0


def calibrate(given: argparse.Namespace) -> int:
    from pathlib import Path

    from lib.recordings.judging import audio_files
    from lib.recordings.judging import calibrate as calibrated

    paths = [path for item in given.speech for path in (audio_files(item) if Path(item).is_dir() else [item])]
    detector, skipped = calibrated(paths, given.out, given.detector)
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{given.out}: calibrated on {len(paths) - len(skipped)} recordings, {len(detector.calibration)} pieces for p-values; "
          f"use it with --detector {given.out}")
    if len(detector.calibration) < 19:
        print("note: 19 such pieces or more, about four minutes of speech, are needed for verdicts at alpha 0.05", file=sys.stderr)
    return 1 if skipped else 0


# --- evaluation and data ----------------------------------------------------------------------------------------------------


def evaluate(given: argparse.Namespace) -> int:
    from lib.evaluate.results import evaluate as evaluated

    found = evaluated(given.scores, given.key)
    for text in found["warnings"]:
        print(f"warning: {text}", file=sys.stderr)
    print(f"{found['bonafide']} bonafide, {found['spoof']} spoof clips; score up = bona fide")
    print(f"EER {found['eer']:.4%}  AUC {found['auc']:.4f}  min DCF {found['min_dcf']:.4f}  act DCF {found['act_dcf']:.4f}  "
          f"CLLR {found['cllr']:.4f} bits")
    for row in found["attacks"]:
        print(f"  {row['attack'] or '(unnamed)':24s} {row['spoof']:7d} spoof  EER {row['eer']:8.4%}  AUC {row['auc']:.4f}  "
              f"min DCF {row['min_dcf']:.4f}")
    if given.json:
        import json

        from lib.paths import write_text

        write_text(given.json, json.dumps(_finite({"schema": 1, **found}), indent=1, default=float) + "\n")
    if given.det:
        from lib.evaluate.results import write_det

        write_det(given.scores, given.key, given.det)
    return 0


def _finite(value: object) -> object:
    """JSON has no NaN: such numbers become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def data(given: argparse.Namespace) -> int:
    import warnings

    from lib.data.public import DATASETS, DatasetError, download_dataset, load_dataset

    if given.list:
        for one in DATASETS.values():
            print(f"{one.name:16s} {one.title}; licence: {one.licence}\n{'':16s} from {one.source}")
            if one.caution:
                print(f"{'':16s} {one.caution}")
        return 0
    if not given.corpus or not given.root:
        raise UsageError("name a --corpus and its --root, or ask for --list")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        root = download_dataset(given.corpus, given.root, given.part) if given.download else given.root
        table = load_dataset(given.corpus, root, given.check)
    for one in caught:
        print(f"warning: {one.message}", file=sys.stderr)
    print(f"{given.corpus}: {len(table)} clips below {table.attrs['root']}, release {table.attrs['release']}")
    print(table.groupby(["split", "label"]).size().to_string())
    if given.check:
        print(f"{table.seconds.sum() / 3600:.2f} h, rates {sorted(table.rate_hz.unique().tolist())} Hz")
    if table.attrs["caution"]:
        print(f"note: {table.attrs['caution']}")
    if given.out:
        from lib.paths import atomic

        if not given.out.endswith((".parquet", ".csv")):
            raise DatasetError(f"{given.out}: expected a name in .parquet or .csv")
        with atomic(given.out) as temporary:
            table.to_parquet(temporary) if given.out.endswith(".parquet") else table.to_csv(temporary, index=False)
    return 0


def bench(given: argparse.Namespace) -> int:
    import pandas as pd

    from benchmarks.bench import draw_cost, run

    if given.figure and given.only and not {"memory", "width"} <= set(given.only):
        raise ValueError("--figure draws the parts memory and width: add --only memory --only width, or leave --only out")
    tables = []
    for table in run(given.quick, tuple(given.only)):
        tables.append(table)
        print(table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4g}"), flush=True)
    if given.csv:
        from lib.paths import atomic

        with atomic(given.csv) as temporary:
            pd.concat(tables, ignore_index=True).to_csv(temporary, index=False)
    if given.figure:
        draw_cost(pd.concat(tables, ignore_index=True), given.figure)
    return 0
