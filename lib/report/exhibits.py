"""Owns what a reader sees: figures (SVG, PNG, CSV of what is drawn, alt text) and tables, in one style."""

from __future__ import annotations

import base64
import io
import json
import platform
import subprocess
import sys
from functools import cache
from html import escape
from importlib import metadata
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from tqdm import tqdm

from lib.paths import PROJECT, REFERENCE, REPORTS, atomic, clocked, write_json, write_text
from lib.settings import Settings

TOLERANCE = {"green": 0.02, "amber": 0.06}
"""How far a table of this run may be from the reference run. Another processor or thread count changes the last bits of
training, and through it scores: AUC moves by a few hundredths. Counts and hashes must not move at all."""
MAP_COLOURS = "magma"
LEVEL_COLOURS = "viridis"
PALETTE = "colorblind"
MOST_SHOWN = 12
"""Rows of a table on its page; a longer one is folded."""
MOST_ROWS = 60
"""Of the data of a figure on its page; with more, the page would be mostly numbers."""


class StudyError(RuntimeError):
    """The study cannot go on; the message says where it stopped and what to do."""


@cache
def _bar(stage: str, total: int) -> tqdm:
    return tqdm(total=total, desc=stage, file=sys.stdout, mininterval=0.1 if sys.stdout.isatty() else 15)


def progress(stage: str, done: int, total: int) -> None:
    """Draw the bar of a stage."""
    _bar(stage, total).update(done - _bar(stage, total).n)
    if done == total:
        _bar.cache_clear()  # closed with it


def style(quick: bool = False) -> None:
    """One look for all figures: colour-blind-safe, readable at the width of a page; `quick`: nearly the same, without
    seaborn, whose import takes a second."""
    if quick:
        matplotlib.style.use(["seaborn-v0_8-whitegrid", "seaborn-v0_8-colorblind"])
    else:
        import seaborn

        seaborn.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font="DejaVu Sans")
    matplotlib.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True, "axes.titlesize": 11,
        "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "image.aspect": "auto",
        "image.interpolation": "nearest", "svg.hashsalt": "study", "svg.fonttype": "path", "axes.grid.axis": "both",
    })


class Exhibits:
    """Writes figures and tables of one notebook below `folder`, and shows them in the notebook. Every figure becomes
    NAME.svg, .png, .csv (what is drawn) and .txt (alt text), every table NAME.csv and NAME.json with its provenance;
    `quick`, for a page that somebody waits for: no SVG."""

    def __init__(self, folder: Path, notebook: str, provenance: dict[str, object], quick: bool = False) -> None:
        self.figures, self.tables = Path(folder) / "figures", Path(folder) / "tables"
        self.notebook, self.provenance, self.quick = notebook, provenance, quick
        style(quick)

    @clocked("drawing")
    def figure(self, figure: matplotlib.figure.Figure, name: str, alt: str, data: pd.DataFrame | None = None) -> None:
        """Save and show `figure`; `alt` says in words what it shows; `data` is what is drawn, shown under a fold."""
        import matplotlib.pyplot as pyplot
        from IPython.display import Image, display

        stem = self.figures / f"{self.notebook[:2]}_{name}"
        if not self.quick:
            trail = {"Date": None, "Description": json.dumps(self.provenance)}
            with atomic(stem.with_suffix(".svg")) as temporary:
                figure.savefig(temporary, format="svg", metadata=trail)
        with atomic(stem.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png", metadata={"Description": json.dumps(self.provenance)})
        write_text(stem.with_suffix(".txt"), alt + "\n")
        pyplot.close(figure)
        display(Image(stem.with_suffix(".png"), alt=alt))
        if data is not None:
            with atomic(stem.with_suffix(".csv")) as temporary:
                data.to_csv(temporary, index=False, float_format="%.6g")
            rows = data.head(MOST_ROWS).to_html(index=False, float_format="{:.4g}".format, na_rep="", border=0)
            if len(data) > MOST_ROWS:
                rows += f"<p class='caption'>{len(data) - MOST_ROWS:,} more rows: figures/{stem.name}.csv</p>"
            fold = f"<details class='data'><summary>Data of this figure</summary>{rows}</details>"
            display({"text/html": fold, "text/plain": "[Data of this figure]"}, raw=True)

    def table(self, table: pd.DataFrame, name: str, caption: str = "", digits: int = 3, show: bool = True,
              reference: list[str] | None = None) -> None:
        """Save `table` as CSV and JSON and show it with `digits` decimals, folded where it has many rows.

        `reference` are the columns that name a row. With them, at the preset study, rows of the reference run that this
        run did not compute are added, and a column `run` says which is which.
        """
        from IPython.display import display

        stem = self.tables / f"{self.notebook[:2]}_{name}"
        source = REFERENCE / "full" / f"{stem.name}.csv"
        beside = bool(reference) and self.provenance.get("preset") == "study" and source.exists()
        if beside:
            table = beside_reference(table, pd.read_csv(source), reference)
        with atomic(stem.with_suffix(".csv")) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6f")
        rows = json.loads(table.to_json(orient="records", double_precision=6))
        write_json(stem.with_suffix(".json"), {"caption": caption, "provenance": self.provenance, "rows": rows})
        if show:
            look = {"index": False, "float_format": f"{{:.{digits}f}}".format, "na_rep": ""}
            html = f"<p class='caption'>{escape(caption)}</p>" if caption else ""
            rows = table.to_html(border=0, **look)
            fold = f"<details class='data'><summary>{len(table)} rows</summary>{rows}</details>"
            html += fold if len(table) > MOST_SHOWN else rows
            if beside:
                html += ("<p class='caption'>The rows <em>reference</em> were not computed now: they are the "
                         f"<a href='../reference/full/{source.name}'>reference run's</a>.</p>")
            text = table.to_string(**look)
            display({"text/html": f"<div class='table'>{html}</div>", "text/plain": text}, raw=True)


def beside_reference(table: pd.DataFrame, reference: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """`table`, then the rows of `reference` whose values in the columns `names` it lacks; `run` says which. An empty
    table gets all of them, with every column."""
    if table.empty:
        return reference.assign(run="reference")
    lacking = ~reference.set_index(names).index.isin(table.set_index(names).index)
    rows = reference.loc[lacking, [name for name in table if name in reference]]
    return pd.concat([table.assign(run="this run"), rows.assign(run="reference")], ignore_index=True)


def finding(text: str) -> None:
    """Close a notebook with its one-sentence finding; the index quotes it (the cell is tagged `finding`)."""
    from IPython.display import Markdown, display

    display(Markdown(f"**Finding.** {text}"))


def with_interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """`0.93 [0.88, 0.97]`."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def time_frequency(axis: matplotlib.axes.Axes, image: np.ndarray, seconds: float, low_hz: float, high_hz: float,
                   limits: tuple[float, float], colours: str = LEVEL_COLOURS, title: str = "") -> object:
    """Draw `image` (frequency, frame) with axes in seconds and kilohertz and fixed colours; returns the artist."""
    drawn = axis.imshow(image, origin="lower", extent=(0, seconds, low_hz / 1000, high_hz / 1000), vmin=limits[0],
                        vmax=limits[1], cmap=colours)
    axis.set(xlabel="time (s)", ylabel="frequency (kHz)", title=title)
    axis.grid(False)
    return drawn


def player(audio: np.ndarray, rate_hz: int, label: str) -> None:
    """An audio player that needs no network, with a label; the audio is embedded as Ogg Vorbis to keep pages small."""
    import soundfile
    from IPython.display import HTML, display

    stream = io.BytesIO()
    soundfile.write(stream, np.clip(audio, -1, 1), rate_hz, format="OGG", subtype="VORBIS")
    data = base64.b64encode(stream.getvalue()).decode()
    display(HTML(f"<figure class='player'><figcaption>{escape(label)}</figcaption>"
                 f"<audio controls preload='metadata' src='data:audio/ogg;base64,{data}'></audio></figure>"))


def duration(seconds: float) -> str:
    """A time in words: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def code_revision() -> str:
    """Git revision of the code, with a plus sign where it has local changes; `unknown` outside a checkout."""
    asked = (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--", "lib", "notebooks"))
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
            for command in asked)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changes.strip() else "")


def provenance(settings: Settings, data: str = "") -> dict[str, object]:
    """What made a table or figure: settings and data hash, code revision, seed, device, versions."""
    import torch

    names = ("torch", "torchaudio", "numpy", "scipy", "scikit-learn", "librosa", "soundfile")
    return {
        "preset": settings.preset, "seed": settings.seed, "settings": settings.digest(), "data": data,
        "code": code_revision(), "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": settings.run.threads, "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


def verify(preset: str, reference: Path | str | None = None) -> list[tuple[str, str, str]]:
    """Compare the tables of the last run with the committed reference of a preset, or with those in the folder
    `reference` (a copy of another run's reports/tables): [(table, green | amber | red, why)].

    A table of this run that has no reference is amber: nobody has vouched for it. Raises StudyError where there is no
    reference or nothing was run.
    """
    folder, ours = Path(reference) if reference else REFERENCE / preset, REPORTS / "tables"
    tables = sorted(folder.glob("*.csv"))
    if not tables and reference:
        raise StudyError(f"no tables (.csv) in {folder}: expected a copy of another run's reports/tables")
    if not tables:
        raise StudyError(f"no reference tables for preset {preset!r} under {folder}; --reference DIR takes others")
    if folder.resolve() == ours.resolve():
        raise StudyError(f"{folder} holds this run's own tables, which always equal themselves: name another run's")
    if not ours.is_dir():
        raise StudyError("nothing to compare: run `make study` first")
    unknown = sorted({path.name for path in ours.glob("*.csv")} - {path.name for path in tables})
    return [(path.name, *_compared(path, ours / path.name)) for path in tables] + [
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
