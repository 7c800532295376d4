"""Owns the look of the reports: executed notebooks and their index as pages that need no network, and pages as PDF. A
Content-Security-Policy in each page forbids remote loads and any script but the page's own."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
import shutil
import subprocess
import tempfile
import warnings
from html import escape
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from bs4 import BeautifulSoup, Tag
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, TagRemovePreprocessor

from lib.paths import TEMPLATES, atomic, write_text
from lib.report.exhibits import duration

SCRIPT = """document.getElementById("show-all").addEventListener("change", event =>
  document.querySelectorAll("details.source").forEach(cell => { cell.open = event.target.checked; }));"""
_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = ("default-src 'none'; img-src data: file: 'self'; media-src data: file: 'self'; style-src 'unsafe-inline'; "
          f"script-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'")
SMOKE = ("Smoke run: every step is the real one, but on a handful of clips and with networks that are hardly trained. "
         "The numbers here mean nothing.")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMOTE = re.compile(r"^\s*((https?|ftp):|[/\\]{2})", re.IGNORECASE)
_WITHOUT_ALT = "No description has been provided for this image"  # what nbconvert writes when there is none
_LOG = logging.getLogger("lib.report.html")
_LOG.setLevel(logging.ERROR)  # nbconvert warns of missing alt texts, which are added later
_PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                            undefined=jinja2.StrictUndefined)


def export_notebook(executed: Path, html: Path, *, provenance: dict[str, object] | None = None,
                    index: str = "../index.html", previous: tuple[str, str] | None = None,
                    next: tuple[str, str] | None = None) -> Path:
    """Write the executed notebook `executed` as the page `html`, whole or not at all; returns `html`.

    `provenance` is the footer, `previous` and `next` are `(address, title)`. Code is folded, except in cells tagged
    `parameters`, `injected-parameters` or `method`, and so are printed logs of more than 12 lines; cells tagged
    `remove-cell` and standard error are left out. Raises ValueError if the page would load something remote.
    """
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_shown(output) for output in cell.outputs if output.get("name") != "stderr"]
    exporter = _Exporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)], embed_images=True,
                         exclude_input_prompt=True, exclude_output_prompt=True, log=_LOG)
    exporter.register_preprocessor(TagRemovePreprocessor(remove_cell_tags={"remove-cell"}), enabled=True)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor(), enabled=True)
    cells, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(Path(executed).parent)}})
    body, toc, heading = _finished(cells)
    return _write_page(html, "page.html.j2", provenance, _preset(notebook) == "smoke", kind="notebook", body=body,
                       toc=toc, title=heading or Path(executed).stem, previous=previous, next=next, index=index)


def write_table(path: Path, table: pd.DataFrame, title: str, summary: str = "",
                provenance: dict[str, object] | None = None) -> Path:
    """Write `table` as a page of its own. Its cells are escaped."""
    body = f"<h1>{escape(title)}</h1><p>{escape(summary)}</p>" + table.to_html(index=False, na_rep="", border=0)
    return _write_page(path, "page.html.j2", provenance, kind="notebook", body=_finished(body)[0], toc=[], title=title,
                       previous=None, next=None, index="")


def write_index(path: Path, entries: list[dict], figure: tuple[bytes | Path, str] | None = None,
                provenance: dict[str, object] | None = None, *, headline: str = "", times: str = "") -> Path:
    """Write the index of the reports at `path`. `entries` are mappings with `href`, `number` and what `notebook_facts`
    gives; `figure` is the study's main figure and its alt text. `headline` and `times` are trusted HTML, such as a
    table; questions and findings are Markdown, in which HTML is escaped."""
    known = {"number": "", "title": "", "question": "", "finding": "", "seconds": None, "figure": None, "preset": ""}
    shown = [known | entry for entry in entries]
    for entry in shown:
        entry |= {"question": _inline(entry["question"]), "finding": _inline(entry["finding"]),
                  "time": "" if entry["seconds"] is None else duration(entry["seconds"]),
                  "figure": entry["figure"] and _thumbnail(entry["figure"], 520)}
    return _write_page(path, "index.html.j2", provenance, "smoke" in {entry["preset"] for entry in shown}, kind="index",
                       title="Speech deepfakes: the study", entries=shown, headline=_finished(headline)[0],
                       figure=figure and (_thumbnail(figure[0], 2000), figure[1]), times=_finished(times)[0])


def notebook_facts(path: Path) -> dict[str, object]:
    """What the index says of a notebook: `title` (the first level-1 heading), `question` (the paragraph after it),
    `finding` (the Markdown displayed by the cell tagged so), `figure` (the PNG of the cell tagged `main-figure`, or
    else the first PNG), `seconds`, `preset`. What is absent is "" or None."""
    notebook = nbformat.read(path, as_version=4)
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    opening = re.search(r"^# +(.+?) *#*$(?:\s*\n)*((?:(?!#|---).+\n?)*)", prose, re.MULTILINE)
    title, question = opening.groups() if opening else ("", "")
    finding, figures, main = "", [], []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        tags = cell.metadata.get("tags", [])
        for data in (output.get("data", {}) for output in cell.outputs):
            finding = data.get("text/markdown", finding) if "finding" in tags else finding
            if "image/png" in data:
                (main if "main-figure" in tags else figures).append(data["image/png"])
    figure = (main[-1:] or figures[:1] or [None])[0]
    return {"title": title.strip(), "question": " ".join(question.split()), "finding": " ".join(finding.split()),
            "seconds": notebook.metadata.get("papermill", {}).get("duration"), "preset": _preset(notebook),
            "figure": base64.b64decode(figure) if figure else None}


def print_page(page: Path, target: Path) -> None:
    """Print `page` on A4 as the PDF `target` through Chromium, whole or not at all. Raises RuntimeError."""
    if not (program := next(filter(None, map(shutil.which, BROWSERS)), None)):
        raise RuntimeError(f"expected one of {', '.join(BROWSERS)} on the PATH. Debian: apt-get install chromium")
    if not Path(page).is_file():
        raise RuntimeError(f"{page} is missing; make the reports first: make study")
    # Chromium refuses its sandbox to root; only our own pages, which run no foreign script, are opened.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer",
               "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with atomic(target) as temporary, tempfile.TemporaryDirectory() as profile:
        options += [f"--user-data-dir={profile}", f"--print-to-pdf={temporary}"]
        done = subprocess.run([program, *options, Path(page).resolve().as_uri()], capture_output=True, text=True)
        if not temporary.read_bytes().startswith(b"%PDF"):
            raise RuntimeError(f"{program} did not print {page}: {done.stderr.strip()[-300:]}")


def print_reports(folder: Path) -> None:
    """Print the index and every page below `folder` into its folder pdf."""
    for page in [folder / "index.html", *sorted((folder / "html").glob("*.html"))]:
        print_page(page, folder / "pdf" / f"{page.stem}.pdf")


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return _mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        name = f"{name}*" if name in ("align", "alignat", "gather", "equation", "multline") else name  # unnumbered
        return _mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class _Exporter(HTMLExporter):
    @jinja2.pass_context
    def markdown2html(self, context: jinja2.runtime.Context, source: str) -> str:
        """Markdown with equations in MathML; the images beside the notebook and its attachments inside."""
        path = context.get("resources", {}).get("metadata", {}).get("path", "")
        return _markdown(source, escape=False, path=path, embed_images=True,
                         attachments=context.get("cell", {}).get("attachments", {}))


def _markdown(source: str, **options: object) -> str:
    return MarkdownWithMath(renderer=_Renderer(exclude_anchor_links=True, **options)).render(source)


def _inline(source: str) -> str:
    """One paragraph of untrusted Markdown as HTML without its `<p>`."""
    text = _markdown(" ".join((source or "").split()), escape=True, allow_harmful_protocols=False).strip()
    return text.removeprefix("<p>").removesuffix("</p>")


def _mathml(tex: str, display: str) -> str:
    """The equation `tex` as MathML; an equation that is not understood is shown as TeX, with a warning."""
    known = re.sub(r"\\mathrm\{(\w)\}", r"\\text{\1}", tex.strip()).replace(r"\arg\min", r"\argmin")
    known = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", known.replace(r"\arg\max", r"\argmax"))
    try:
        math, reason = convert(known, display=display), "an unknown command"
    except Exception as error:  # noqa: BLE001 the package raises many kinds
        math, reason = "<mi>\\", type(error).__name__
    if "<mi>\\" in math:
        warnings.warn(f"equation shown as TeX ({reason}): {tex.strip()}", stacklevel=2)
        return f'<code class="tex">{escape(tex.strip())}</code>'
    single = "".join(f"(?<!<{name}>)" for name in ("msub", "msup", "msubsup", "munder", "mover", "mfrac", "mroot"))
    math = re.sub(rf"{single}(<mi>(?:cos|sin|tan|log|ln|exp)</mi>)(?=<m(?!o))", r'\1<mspace width="0.17em"/>', math)
    return math.replace("<math ", f'<math alttext="{escape(tex.strip())}" ', 1)


def _shown(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave in `output` only what a page without scripts can show; move its alt text to where nbconvert looks."""
    for name in [name for name in output.get("data", {}) if "javascript" in name or "widget" in name]:
        del output.data[name]
    if alt := output.get("metadata", {}).get("alt"):
        for name in ("image/png", "image/jpeg", "image/svg+xml"):
            output.metadata.setdefault(name, {}).setdefault("alt", alt)
    return output


def _preset(notebook: nbformat.NotebookNode) -> str:
    return notebook.metadata.get("papermill", {}).get("parameters", {}).get("preset", "")


def _finished(cells: str) -> tuple[str, list[tuple[int, str, str]], str]:
    """The HTML of cells with anchors, alt texts and scrollable tables; contents `(level, anchor, text)`; the title."""
    soup, toc, title, last, seen = BeautifulSoup(cells, "html.parser"), [], "", "", {}
    if remote := soup.find(src=REMOTE):
        raise ValueError(f"expected a page that loads nothing remote, not {remote['src'][:80]}: it belongs beside")
    for tag in soup.find_all(["h1", "h2", "h3", "h4", "img", "table", "script"]):
        if tag.name == "script":
            tag.decompose()
        elif tag.name == "img" and tag.get("alt", "").strip() in ("", _WITHOUT_ALT):
            tag["alt"] = f"Figure: {last}" if last else "Figure"
        elif tag.name == "table":
            _mark_words(tag)
            tag.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
        elif tag.name[0] == "h":
            last = " ".join(tag.get_text().split())
            slug = re.sub(r"[^\w]+", "-", last.lower()).strip("-") or "section"
            seen[slug] = seen.get(slug, 0) + 1
            tag["id"] = slug if seen[slug] == 1 else f"{slug}-{seen[slug]}"
            if tag.name == "h1" and not title:
                title = last
            elif tag.name in ("h1", "h2", "h3"):
                toc.append((max(2, int(tag.name[1])), tag["id"], last))
    return str(soup), toc, title


def _mark_words(table: Tag) -> None:
    """Give the cells of each column of words the class `words`, and `long` too where they are sentences, so that words
    wrap and numbers do not. A table with joined cells is left alone."""
    if table.find(["td", "th"], colspan=True) or table.find(["td", "th"], rowspan=True):
        return
    rows = [row.find_all(["td", "th"]) for row in table.find_all("tr")]
    for column in range(max(map(len, rows), default=0)):
        cells = [row[column] for row in rows if column < len(row)]
        texts = [" ".join(cell.get_text().split()) for cell in cells if cell.parent.find("td")]
        if any(re.search(r"[^\W\d_]{2}", re.sub(r"\b(nan|inf)\b", "", text, flags=re.IGNORECASE)) for text in texts):
            names = ["words", "long"] if max(map(len, texts)) > 40 else ["words"]
            for cell in cells:
                cell["class"] = [*cell.get("class", []), *names]


def _write_page(path: Path, template: str, provenance: dict[str, object] | None, smoke: bool = False,
                **values: object) -> Path:
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    rows = [(name, ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value)
            for name, value in (provenance or {}).items()]
    values |= {"css": css, "policy": POLICY, "script": SCRIPT, "provenance": rows, "banner": SMOKE if smoke else ""}
    write_text(path, _PAGES.get_template(template).render(values))
    return Path(path)


def _thumbnail(image: bytes | Path, width: int) -> str:
    """A PNG (bytes or path) as a data address, made narrower than `width` pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
        small = picture.convert("RGB")
    small.thumbnail((width, small.height))
    small.save(buffer := io.BytesIO(), "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
