"""Owns what a reader sees: figures (SVG, PNG, CSV of what is drawn, alt text) and tables, on one style and fixed scales."""

from __future__ import annotations

import io
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from lib.paths import PROJECT, atomic, write_json, write_text
from lib.settings import Settings

MAP_COLOURS = "magma"
LEVEL_COLOURS = "viridis"
PALETTE = "colorblind"


def style() -> None:
    """One look for all figures: colour-blind-safe, readable at the width of a page."""
    import seaborn

    seaborn.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font="DejaVu Sans")
    matplotlib.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True, "axes.titlesize": 11,
        "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "image.aspect": "auto",
        "image.interpolation": "nearest", "svg.hashsalt": "study", "svg.fonttype": "path", "axes.grid.axis": "both",
    })


class Exhibits:
    """Writes figures and tables of one notebook below `folder`, and shows them in the notebook.

    Every figure becomes NAME.svg, NAME.png, NAME.csv (what is drawn) and NAME.txt (alt text); every table NAME.csv and
    NAME.json with the provenance of the run beside it.
    """

    def __init__(self, folder: Path, notebook: str, provenance: dict[str, object]) -> None:
        self.figures, self.tables = Path(folder) / "figures", Path(folder) / "tables"
        self.notebook, self.provenance = notebook, provenance
        style()

    def figure(self, figure: matplotlib.figure.Figure, name: str, alt: str, data: pd.DataFrame | None = None) -> None:
        """Save and show `figure`; `alt` says in words what it shows; `data` is what is drawn, shown under a fold."""
        import matplotlib.pyplot as pyplot
        from IPython.display import display

        stem = self.figures / f"{self.notebook[:2]}_{name}"
        with atomic(stem.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Description": json.dumps(self.provenance)})
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Description": json.dumps(self.provenance)})
        with atomic(stem.with_suffix(".png")) as temporary:
            temporary.write_bytes(buffer.getvalue())
        write_text(stem.with_suffix(".txt"), alt + "\n")
        pyplot.close(figure)
        display(_Image(buffer.getvalue()), metadata={"image/png": {"alt": alt}})
        if data is not None:
            with atomic(stem.with_suffix(".csv")) as temporary:
                data.to_csv(temporary, index=False, float_format="%.6g")
            display(_Fold("Data of this figure", data, f"figures/{stem.name}.csv"))

    def table(self, table: pd.DataFrame, name: str, caption: str = "", digits: int = 3, show: bool = True) -> None:
        """Save `table` as CSV and JSON and show it with `digits` decimals."""
        from IPython.display import display

        stem = self.tables / f"{self.notebook[:2]}_{name}"
        with atomic(stem.with_suffix(".csv")) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6f")
        rows = json.loads(table.to_json(orient="records", double_precision=6))
        write_json(stem.with_suffix(".json"), {"caption": caption, "provenance": self.provenance, "rows": rows})
        if show:
            display(_Table(table, caption, digits))


class _Image:
    def __init__(self, png: bytes) -> None:
        self.png = png

    def _repr_png_(self) -> bytes:
        return self.png


class _Table:
    def __init__(self, table: pd.DataFrame, caption: str, digits: int) -> None:
        self.table, self.caption, self.digits = table, caption, digits

    def _repr_html_(self) -> str:
        shown = self.table.to_html(index=False, float_format=lambda value: f"{value:.{self.digits}f}", na_rep="", border=0)
        caption = f"<p class='caption'>{_escaped(self.caption)}</p>" if self.caption else ""
        return f"<div class='table'>{caption}{shown}</div>"

    def __repr__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.{self.digits}f}")


class _Fold:
    MOST = 60  # rows; with more, the page would be mostly numbers

    def __init__(self, title: str, table: pd.DataFrame, file: str) -> None:
        self.title, self.table, self.file = title, table, file

    def _repr_html_(self) -> str:
        shown = self.table.head(self.MOST).to_html(index=False, float_format=lambda value: f"{value:.4g}", na_rep="", border=0)
        more = len(self.table) - self.MOST
        rest = f"<p class='caption'>{more:,} more rows: {_escaped(self.file)}</p>" if more > 0 else ""
        return f"<details class='data'><summary>{_escaped(self.title)}</summary>{shown}{rest}</details>"

    def __repr__(self) -> str:
        return f"[{self.title}]"


def _escaped(text: str) -> str:
    import html

    return html.escape(str(text))


def finding(text: str) -> None:
    """Close a notebook with its one-sentence finding; the index quotes it (the cell is tagged `finding`)."""
    from IPython.display import Markdown, display

    display(Markdown(f"**Finding.** {text}"))


def with_interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """`0.93 [0.88, 0.97]`."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def time_frequency(axis: matplotlib.axes.Axes, image: np.ndarray, seconds: float, low_hz: float, high_hz: float,
                   limits: tuple[float, float], colours: str = LEVEL_COLOURS, title: str = "") -> object:
    """Draw `image` (frequency, frame) with axes in seconds and kilohertz and fixed colour limits; returns the artist."""
    drawn = axis.imshow(image, origin="lower", extent=(0, seconds, low_hz / 1000, high_hz / 1000), vmin=limits[0],
                        vmax=limits[1], cmap=colours)
    axis.set(xlabel="time (s)", ylabel="frequency (kHz)", title=title)
    axis.grid(False)
    return drawn


def player(audio: np.ndarray, rate_hz: int, label: str) -> None:
    """An audio player that works without a network, with a label; the audio is embedded as Ogg Vorbis to keep pages small."""
    import base64

    import soundfile
    from IPython.display import HTML, display

    stream = io.BytesIO()
    soundfile.write(stream, np.clip(audio, -1, 1), rate_hz, format="OGG", subtype="VORBIS")
    data = base64.b64encode(stream.getvalue()).decode()
    display(HTML(f"<figure class='player'><figcaption>{_escaped(label)}</figcaption>"
                 f"<audio controls preload='metadata' src='data:audio/ogg;base64,{data}'></audio></figure>"))


def code_revision() -> str:
    """Git revision of the code, with a plus sign where it has local changes; `unknown` outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "--", "lib", "notebooks"], cwd=PROJECT, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


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
