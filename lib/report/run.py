"""Owns the run of the study: stages in order, papermill, HTML, index, and the comparison with the reference tables."""

from __future__ import annotations

import difflib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from lib.paths import NOTEBOOKS, PACKAGE, PROJECT, REFERENCE, REPORTS, ROOT, RUNS, TEMPLATES, digest_of, file_digest, write_json
from lib.report.exhibits import provenance
from lib.settings import Settings, SettingsError


class StudyError(RuntimeError):
    """The study cannot go on; the message says where it stopped and what to do."""


def notebooks(only: tuple[str, ...] = (), start: str = "") -> list[Path]:
    """The numbered notebooks in order; `only` and `start` take numbers such as 31.

    Raises StudyError for a number that no notebook has.
    """
    everything = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    known = [path.name[:2] for path in everything]
    for number in (*only, *([start] if start else [])):
        if str(number)[:2] not in known:
            raise StudyError(f"no notebook has the number {number}; there are {', '.join(known)}")
    chosen = [path for path in everything if not only or path.name[:2] in {str(number)[:2] for number in only}]
    return [path for path in chosen if not start or path.name[:2] >= str(start)[:2]]


def code_digest(paths: list[Path]) -> str:
    """Hash of `paths` and of the library's code without the command: a stage runs again when it changes."""
    library = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("cli.py", "__main__.py"))
    return digest_of([(path.name, file_digest(path)) for path in [*library, *paths]])


def checked_parameters(path: Path, parameters: dict[str, object]) -> dict[str, object]:
    """`parameters`, which the notebook's cell tagged `parameters` must know by name and by annotated type.

    Raises SettingsError for an unknown name (naming the nearest) or a value of another type.
    """
    import papermill

    known = {name: entry["inferred_type_name"] for name, entry in papermill.inspect_notebook(path).items()}
    if not known:
        raise StudyError(f"{path.name} has no cell tagged 'parameters'")
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{path.name} has no parameter {name!r}; the nearest known one is {near!r}")
        kinds = {"float": ("float", "int")}.get(known[name], (known[name],))
        if type(value).__name__ not in kinds:
            raise SettingsError(f"parameter {name!r} of {path.name} takes a value of type {known[name]}, not {value!r}")
    return parameters


def run_study(settings: Settings, changes: dict[str, str], only: tuple[str, ...] = (), start: str = "",
              force: bool = False, say=print) -> Path:
    """Execute the notebooks in order and write the HTML reports and the index; returns the index's path.

    A stage is skipped when its notebook, the library, the settings and the stages before it are unchanged. Raises
    StudyError where a notebook fails, with the path of the partly executed notebook; everything before it is kept.
    """
    chosen = {path.name for path in notebooks(only, start)}
    folder = RUNS / settings.preset
    every = notebooks()
    earlier, times, started = "", {}, time.time()
    for number, path in enumerate(every):
        stamp_path = folder / "stamps" / f"{path.stem}.json"
        target = REPORTS / "executed" / path.name
        key = digest_of([earlier, code_digest([path]), settings.digest(), sorted(changes.items())])
        stamp = json.loads(stamp_path.read_text()) if stamp_path.exists() else {}
        fresh = stamp.get("key") == key and target.exists() and stamp.get("executed") == file_digest(target)
        # The summary reads the tables of all others, so what comes before a stage is part of its key.
        earlier = key
        if path.name not in chosen or (fresh and not force):
            if path.name in chosen:
                say(f"[{number + 1:2d}/{len(every)}] {path.stem}: unchanged, skipped")
            times[path.stem] = stamp.get("seconds")
            continue
        say(f"[{number + 1:2d}/{len(every)}] {path.stem}: running ...")
        began = time.time()
        options = ",".join(f"{name}={value}" for name, value in sorted(changes.items()) if name not in ("preset", "seed"))
        given = {"preset": settings.preset, "seed": settings.seed, "options": options}
        _execute(path, target, checked_parameters(path, given))
        seconds = time.time() - began
        times[path.stem] = seconds
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        write_json(stamp_path, {"key": key, "executed": file_digest(target), "seconds": round(seconds, 1), "peak_mb": round(peak)})
        say(f"[{number + 1:2d}/{len(every)}] {path.stem}: done in {seconds:.0f} s")
    index = write_reports(settings)
    say(f"study finished in {time.time() - started:.0f} s; open {index}")
    return index


def run_notebook(path: Path, parameters: dict[str, object], page: Path,
                 provenance: dict[str, object] | None = None) -> Path:
    """Execute one notebook with `parameters` in the folder of the notebooks and write it as the HTML page `page`, which
    needs no network. File names among the parameters are absolute.

    Raises SettingsError for a parameter that the notebook does not know, StudyError where a cell fails.
    """
    from lib.report import html

    checked_parameters(path, parameters)
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / path.name
        _execute(path, executed, parameters)
        return html.export_notebook(executed, page, provenance=provenance, index="")


def _execute(path: Path, target: Path, parameters: dict[str, object]) -> None:
    # The kernel must be this environment's own Python, not one registered for the user.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    os.environ["STUDY_ROOT"] = str(ROOT)
    # Its lib must be this one, installed or not.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    import papermill
    from papermill.exceptions import PapermillExecutionError

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{path.stem}.partial.ipynb")
    try:
        papermill.execute_notebook(
            str(path), str(partial), parameters=parameters, kernel_name="python3", cwd=str(NOTEBOOKS),
            progress_bar=sys.stderr.isatty(), log_output=False, extra_arguments=["--IPKernelApp.log_level=ERROR"])
    except PapermillExecutionError as error:
        raise StudyError(
            f"{path.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
            f"the partly executed notebook is {partial}; earlier stages are kept, run the same command to go on") from None
    os.replace(partial, target)


def write_reports(settings: Settings) -> Path:
    """HTML of every executed notebook and the index; returns the path of the index.

    Pages are left as they are where nothing that they show has changed and nobody has touched them.
    """
    executed = [path for path in (REPORTS / "executed" / path.name for path in notebooks()) if path.exists()]
    tables = sorted((REPORTS / "tables").glob("*.json"), key=lambda path: path.stat().st_mtime)
    data = json.loads(tables[-1].read_text())["provenance"]["data"] if tables else "none yet"
    trail, times = provenance(settings, data), stage_times(settings).to_html(index=False, border=0)
    headline, figure = REPORTS / "tables" / "50_headline.csv", REPORTS / "figures" / "50_headline.png"
    shown = [*executed, *(path for path in (headline, figure, figure.with_suffix(".txt")) if path.exists())]
    templates = sorted(path for path in TEMPLATES.rglob("*") if path.is_file())
    index, pages = REPORTS / "index.html", [REPORTS / "html" / f"{path.stem}.html" for path in executed]
    key = digest_of([[(path.name, file_digest(path)) for path in shown], code_digest(templates), trail, times])
    stamp_path = RUNS / settings.preset / "stamps" / "reports.json"
    stamp = json.loads(stamp_path.read_text()) if stamp_path.exists() else {}
    whole = all(path.exists() for path in (index, *pages))
    if whole and stamp == {"key": key, "pages": [file_digest(path) for path in (index, *pages)]}:
        return index
    from lib.report import html  # seconds, which neither an unchanged run need spend nor a kernel that wants the provenance

    facts, entries = [html.notebook_facts(path) for path in executed], []
    around = [None, *((page.name, fact["title"]) for page, fact in zip(pages, facts)), None]
    for number, (path, page, fact) in enumerate(zip(executed, pages, facts)):
        html.export_notebook(path, page, provenance=trail, previous=around[number], next=around[number + 2])
        title = fact["title"].removeprefix(path.name[:2]).strip()
        entries.append(fact | {"number": path.name[:2], "href": f"html/{page.name}", "title": title})
    table = pd.read_csv(headline).to_html(index=False, na_rep="", border=0, float_format="{:.2f}".format) if headline.exists() else ""
    alt = figure.with_suffix(".txt").read_text().strip() if figure.exists() else ""
    html.write_index(index, entries, (figure, alt) if figure.exists() else None, trail,
                     "One-class speech deepfake detection by feature pyramid matching", summary=SUMMARY, headline=table, times=times)
    write_json(stamp_path, {"key": key, "pages": [file_digest(path) for path in (index, *pages)]})
    return index


def stage_times(settings: Settings) -> pd.DataFrame:
    """Where the time of the study went: a row a stage that ran at this preset, and their sum.

    The peak is that of the largest process so far, so its last value is the whole run's.
    """
    stamps = [(path.stem, RUNS / settings.preset / "stamps" / f"{path.stem}.json") for path in notebooks()]
    rows = [{"stage": name} | json.loads(path.read_text(encoding="utf-8")) for name, path in stamps if path.exists()]
    total = sum(row["seconds"] for row in rows)
    shown = [{"stage": row["stage"], "seconds": f"{row['seconds']:.0f}", "share": f"{row['seconds'] / max(total, 1e-9):.0%}",
              "peak memory so far (MB)": row.get("peak_mb", "")} for row in rows]
    peaks = [row["peak_mb"] for row in rows if "peak_mb" in row]
    return pd.DataFrame([*shown, {"stage": "all", "seconds": f"{total:.0f}", "share": "100%",
                                  "peak memory so far (MB)": max(peaks, default="")}])


SUMMARY = """A teacher network turns speech into a pyramid of features; a student learns to imitate it **on real speech only**.
Where the student fails, speech is anomalous. This study implements and extends *Anomaly Detection and Localization for
Speech Deepfakes via Feature Pyramid Matching* (arXiv 2503.18032) on real recordings and real synthesisers, with one shared
channel for all audio. Every number here was computed in this run."""


# How far a table of this run may be from the reference run. Another processor or thread count changes the last bits of
# training, and through it scores: AUC moves by a few hundredths. Counts and hashes must not move at all.
TOLERANCE = {"green": 0.02, "amber": 0.06}


def verify(preset: str, reference: Path | str | None = None) -> list[tuple[str, str, str]]:
    """Compare the tables of the last run with the committed reference of a preset, or with those in the folder `reference` (a copy
    of another run's reports/tables): [(table, green | amber | red, why)].

    A table of this run that has no reference is amber: nobody has vouched for it. Raises StudyError where there is no reference
    or nothing was run.
    """
    folder = Path(reference) if reference else REFERENCE / preset
    tables = sorted(folder.glob("*.csv"))
    if not tables:
        raise StudyError(f"no tables (.csv) in {folder}: expected a copy of another run's reports/tables" if reference else
                         f"no reference tables for preset {preset!r} under {folder}; with --reference DIR another run's are compared")
    if folder.resolve() == (REPORTS / "tables").resolve():
        raise StudyError(f"{folder} holds this run's own tables, which always equal themselves: name a copy of another run's")
    if not (REPORTS / "tables").is_dir():
        raise StudyError("nothing to compare: run `make study` first")
    unknown = sorted({path.name for path in (REPORTS / "tables").glob("*.csv")} - {path.name for path in tables})
    return [(path.name, *_compared(path, REPORTS / "tables" / path.name)) for path in tables] + [
        (name, "amber", "no reference table of this name") for name in unknown]


def _compared(reference: Path, ours: Path) -> tuple[str, str]:
    if not ours.exists():
        return "red", "missing in this run"
    theirs, mine = pd.read_csv(reference), pd.read_csv(ours)
    if list(theirs.columns) != list(mine.columns) or len(theirs) != len(mine):
        return "red", f"shape differs: {theirs.shape} in the reference, {mine.shape} here"
    numbers = [name for name in theirs.columns if pd.api.types.is_float_dtype(theirs[name])]
    exact = [name for name in theirs.columns if name not in numbers]
    differing = [name for name in exact if not theirs[name].astype(str).equals(mine[name].astype(str))]
    if differing:
        return "red", f"column {differing[0]} differs"
    if not numbers:
        return "green", "equal"
    gap = (theirs[numbers] - mine[numbers]).abs()
    scale = theirs[numbers].abs().clip(lower=1.0)
    worst = float((gap / scale).max().max())
    if theirs[numbers].isna().ne(mine[numbers].isna()).any().any():
        return "red", "a value is missing on one side"
    for colour, limit in TOLERANCE.items():
        if not worst > limit:
            return colour, f"largest difference {worst:.4f} (limit {limit})"
    return "red", f"largest difference {worst:.4f} (limit {TOLERANCE['amber']})"


