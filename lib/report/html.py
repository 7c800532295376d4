"""Executed notebooks as HTML that needs no network: reports one can mail, open from a disk and print.

Owns the look of the reports. Cells go through nbconvert and our own small template (`templates/report`),
equations become MathML here, figures stay inside the file. Each page carries a Content-Security-Policy
that forbids remote loads and any script but its own, and `export_notebook` refuses to write a page that
would ask for something remote.
"""

import ast
import base64
import hashlib
import io
import logging
import os
import re
import warnings
from html import escape
from pathlib import Path

import jinja2
import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from lib.paths import TEMPLATES, write_text

SCRIPT = (
    'document.getElementById("show-all").addEventListener("change", event =>\n'
    '  document.querySelectorAll("details.source").forEach(cell => { cell.open = event.target.checked; }));'
)
POLICY = (
    "default-src 'none'; img-src data: file: 'self'; media-src data: file: 'self'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)
_WITHOUT_ALT = "No description has been provided for this image"  # what nbconvert writes when there is none
_LOG = logging.getLogger("lib.report.html")
_LOG.setLevel(logging.ERROR)  # nbconvert warns of missing alt texts, which are added later
_PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                            undefined=jinja2.StrictUndefined)


def export_notebook(executed, html, *, title=None, provenance=None, previous=None, next=None,
                    index="../index.html") -> Path:
    """Write the executed notebook `executed` as the page `html`, whole or not at all; give back `html`.

    `title` defaults to the first heading; `provenance` maps names to values (settings hash, seed, ...) for
    the footer; `previous` and `next` are `(address, title)`, `index` is an address. Code is folded, except
    in cells tagged `parameters` or `injected-parameters`, and so are printed logs of more than 12 lines; cells tagged
    `remove-cell` and all stderr output are left out.
    Raises ValueError if the page would load something remote.
    """
    notebook = nbformat.read(executed, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "remove-cell" not in cell.metadata.get("tags", [])]
    notebook.metadata.pop("widgets", None)
    for cell in (cell for cell in notebook.cells if "outputs" in cell):
        cell.outputs = _merged(cell.outputs)
        for output in cell.outputs:
            _prepare(output)
    exporter = _Exporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)], embed_images=True,
                         exclude_input_prompt=True, exclude_output_prompt=True, log=_LOG)
    for name in ("require_js_url", "mathjax_url", "mermaid_js_url", "mermaid_layout_elk_js_url", "jquery_url",
                 "jupyter_widgets_base_url"):
        setattr(exporter, name, "")
    cells, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(Path(executed).parent)}})
    body, toc, heading = _finished(cells)
    return _write_page(html, "page.html.j2", kind="notebook", title=title or heading or Path(executed).stem,
                       body=body, toc=toc, previous=previous, next=next, index=index, provenance=provenance)


def write_index(path, entries, figure=None, provenance=None, title="Reports", *, summary="", headline="",
                times="", links=()) -> Path:
    """Write the index of the reports at `path`.

    `entries` are mappings with `href`, `number` and what `notebook_facts` gives: `title`, `question`,
    `finding`, `seconds`, `figure` (the bytes or the path of a PNG, or None). `figure` is the same for the
    whole study, or `(image, alt text)`. `headline` and `times` (of the stages) are trusted HTML, such as a
    table; `summary`, questions and findings are Markdown, in which HTML is escaped; `links` are `(address, text)`.
    """
    shown = []
    for entry in entries:
        known = {"number": "", "title": "", "question": "", "finding": "", "seconds": None, "figure": None, **entry}
        shown.append({**known, "question": _inline(known["question"]), "finding": _inline(known["finding"]),
                      "time": _duration(known["seconds"]),
                      "figure": known["figure"] and _thumbnail(known["figure"], 520)})
    if figure is not None:
        image, alt = figure if isinstance(figure, tuple) else (figure, f"Main figure of {title}")
        figure = _thumbnail(image, 2000), alt
    return _write_page(path, "index.html.j2", kind="index", title=title, entries=shown, figure=figure,
                       headline=_finished(headline)[0] if headline else "", summary=_inline(summary),
                       times=_finished(times)[0] if times else "", links=links, provenance=provenance)


def notebook_facts(path) -> dict:
    """What the index says of a notebook: `title`, `question`, `finding`, `seconds`, `figure`.

    The title is the first level-1 heading and the question the paragraph after it. The finding is the
    Markdown, or else the text, displayed by the last code cell tagged `finding`. The figure is the PNG
    of the cell tagged `main-figure`, or else the first PNG. What is absent is "" or None.
    """
    notebook = nbformat.read(path, as_version=4)
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    opening = re.search(r"^# +(.+?) *#*$(?:\s*\n)*((?:(?!#|---).+\n?)*)", prose, re.MULTILINE)
    title, question = opening.groups() if opening else ("", "")
    found, first_figure, main_figure = "", None, None
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        tags = cell.metadata.get("tags", [])
        for output in cell.outputs:
            data = output.get("data", {})
            if "finding" in tags:
                found = data.get("text/markdown") or data.get("text/plain") or output.get("text", "") or found
            if "image/png" in data:
                first_figure = first_figure or data["image/png"]
                main_figure = data["image/png"] if "main-figure" in tags else main_figure
    if re.fullmatch(r"(['\"]).*\1", found.strip(), re.DOTALL):  # the representation of a string
        found = ast.literal_eval(found.strip())
    figure = main_figure or first_figure
    return {"title": title.strip(), "question": " ".join(question.split()), "finding": " ".join(found.split()),
            "seconds": notebook.metadata.get("papermill", {}).get("duration"),
            "figure": base64.b64decode(figure) if figure else None}


def remote_urls(html_text) -> list[str]:
    """Every address that a browser would fetch from elsewhere on loading the page; links do not count."""
    found, css = [], r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)"
    for tag in BeautifulSoup(html_text, "html.parser").find_all(True):
        for name, value in tag.attrs.items():
            value = value if isinstance(value, str) else " ".join(value)
            if name in ("src", "data", "poster", "background", "manifest", "formaction", "action") or (
                    name in ("href", "xlink:href") and tag.name not in ("a", "area")):
                found.append(value)
            elif name in ("srcset", "imagesrcset"):
                found += [part.split()[0] for part in value.split(", ") if part.split()]
            elif name == "srcdoc":
                found += remote_urls(value)
            elif name == "content" and tag.get("http-equiv", "").lower() == "refresh":
                found.append(value.partition("=")[2])
            elif name == "style":
                found += ["".join(pair) for pair in re.findall(css, value, re.IGNORECASE)]
        if tag.name == "style":
            found += ["".join(pair) for pair in re.findall(css, tag.get_text(), re.IGNORECASE)]
        elif tag.name == "script":
            found += re.findall(r"(?:https?:|wss?:)?//[\w.-]+\.[\w./-]+", tag.get_text())
    cleaned = (re.sub(r"[\t\r\n]", "", address).strip(" '\"") for address in found)
    return [address for address in cleaned if re.match(r"(https?|ftp|wss?):|[/\\]{2}", address, re.IGNORECASE)]


class _Renderer(IPythonRenderer):
    def inline_math(self, body):
        return _mathml(body, "inline")

    def block_math(self, body):
        return _mathml(body, "block")

    def latex_environment(self, name, body):
        name = f"{name}*" if name in ("align", "alignat", "gather", "equation", "multline") else name  # unnumbered
        return _mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class _Exporter(HTMLExporter):
    @jinja2.pass_context
    def markdown2html(self, context, source):
        """Markdown with equations in MathML; the images beside the notebook and its attachments inside."""
        path = context.get("resources", {}).get("metadata", {}).get("path", "")
        return _markdown(source, escape=False, path=path, embed_images=True,
                         attachments=context.get("cell", {}).get("attachments", {}))


def _markdown(source, **options):
    return MarkdownWithMath(renderer=_Renderer(exclude_anchor_links=True, **options)).render(source)


def _inline(source):
    """One paragraph of untrusted Markdown as HTML without its `<p>`."""
    text = _markdown(" ".join((source or "").split()), escape=True, allow_harmful_protocols=False).strip()
    return text.removeprefix("<p>").removesuffix("</p>")


def _mathml(tex, display):
    """The equation `tex` as MathML; an equation that is not understood is shown as TeX, with a warning."""
    known = re.sub(r"\\mathrm\{(\w)\}", r"\\text{\1}", tex.strip()).replace(r"\arg\min", r"\argmin")
    known = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", known.replace(r"\arg\max", r"\argmax"))
    try:
        math = convert(known, display=display)
    except Exception as error:  # noqa: BLE001 the package raises many kinds
        math, reason = "<mi>\\", type(error).__name__
    else:
        reason = "an unknown command"
    if "<mi>\\" in math:
        warnings.warn(f"equation shown as TeX ({reason}): {tex.strip()}", stacklevel=2)
        return f'<code class="tex">{escape(tex.strip())}</code>'
    single = "".join(f"(?<!<{name}>)" for name in ("msub", "msup", "msubsup", "munder", "mover", "mfrac", "mroot"))
    math = re.sub(rf"{single}(<mi>(?:cos|sin|tan|log|ln|exp)</mi>)(?=<m(?!o))", r'\1<mspace width="0.17em"/>', math)
    return math.replace("<math ", f'<math alttext="{escape(tex.strip())}" ', 1)


def _merged(outputs):
    """Outputs without standard error, lines printed one after the other (such as progress) as one output; a line that was
    rewritten in place is shown as it was at last."""
    merged = []
    for output in outputs:
        if output.output_type != "stream":
            merged.append(output)
        elif output.name == "stdout":
            if merged and merged[-1].output_type == "stream":
                merged[-1].text += output.text
            else:
                merged.append(output.copy())
    for output in merged:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return merged


def _prepare(output):
    """Leave in `output` only what a page without scripts can show; move its alt text to where nbconvert looks."""
    for name in [name for name in output.get("data", {}) if "javascript" in name or "widget" in name]:
        del output.data[name]
    if alt := output.get("metadata", {}).get("alt"):
        for name in ("image/png", "image/jpeg", "image/svg+xml"):
            output.metadata.setdefault(name, {}).setdefault("alt", alt)


def _finished(cells):
    """The HTML of cells with anchors, alt texts and scrollable tables whose columns of words are marked; the contents
    `(level, anchor, text)`; the first level-1 heading."""
    soup, toc, title, last, seen = BeautifulSoup(cells, "html.parser"), [], None, "", {}
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
            if tag.name == "h1" and title is None:
                title = last
            elif tag.name in ("h1", "h2", "h3"):
                toc.append((max(2, int(tag.name[1])), tag["id"], last))
    return str(soup), toc, title


def _mark_words(table):
    """Give the cells of each column of words the class `words`, and `long` too where they are sentences: numbers stay
    aligned to the right in one line, words to the left, and wrap. A table with joined cells is left alone."""
    if table.find(["td", "th"], colspan=True) or table.find(["td", "th"], rowspan=True):
        return
    rows = [row.find_all(["td", "th"]) for row in table.find_all("tr") if row.find("td")]
    for column in range(max(map(len, rows), default=0)):
        texts = [" ".join(row[column].get_text().split()) for row in rows if column < len(row)]
        if any(re.search(r"[^\W\d_]{2}", re.sub(r"\b(nan|inf)\b", "", text, flags=re.IGNORECASE)) for text in texts):
            names = ["words", "long"] if max(map(len, texts)) > 40 else ["words"]
            for row in table.find_all("tr"):
                cells = row.find_all(["td", "th"])
                if column < len(cells):
                    cells[column]["class"] = [*cells[column].get("class", []), *names]


def _write_page(path, template, *, provenance, **values):
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    rows = [(name, ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value)
            for name, value in (provenance or {}).items()]
    page = _PAGES.get_template(template).render(css=css, policy=POLICY, script=SCRIPT, provenance=rows, **values)
    if remote := remote_urls(page):
        raise ValueError(f"{os.fspath(path)!r}: expected a page that loads nothing remote, found {remote[:5]}. "
                         "Copy what it loads beside the notebook, or display it as a PNG.")
    write_text(path, page)
    return Path(path)


def _thumbnail(image, width):
    """A PNG (bytes or path) as a data address, made narrower than `width` pixels."""
    from PIL import Image

    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        if picture.width > width:
            small = picture.convert("RGB").resize((width, round(picture.height * width / picture.width)))
            small.save(buffer := io.BytesIO(), "PNG", optimize=True)
            content = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _duration(seconds):
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
