"""Pages in a real browser: they load without a network and without an error, sound and pictures are there, print is whole.

Skipped, with the reason, where there is no Chromium; setup.sh installs Debian's.
"""

import io
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from lib.cli import main
from lib.report.browser import Browser, BrowserError, executable
from lib.report.html import TEMPLATES, export_notebook, write_index
from lib.settings import RATE_HZ
from tests.test_html import cells, png, save, text64

try:
    executable()
except BrowserError as error:
    pytestmark = pytest.mark.skip(reason=f"pages cannot be looked at: {error}")


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def notebook_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return export_notebook(save(folder, cells()), folder / "html/40.html", provenance={"seed": 0}, next=("41.html", "Next"))


def page_of(tmp_path, body, style=""):
    path = tmp_path / "page.html"
    path.write_text(f"<!DOCTYPE html><title>t</title><style>{style}</style>{body}", encoding="utf-8")
    return path


def picture_of(path):
    return np.asarray(Image.open(path).convert("L"), dtype=float)


# --- our pages --------------------------------------------------------------------------------------------------------------


def test_a_notebook_page_loads_whole_and_silent(browser, notebook_page):
    look = browser.look(notebook_page)
    assert look.errors == [] and look.requests == [] and look.title == "Anomaly maps"
    assert look.images == 4 and look.broken == [] and look.unnamed == 0 and (look.players, look.silent) == (1, 0)


@pytest.mark.parametrize("size", [(1280, 900), (390, 800)], ids=["desk", "telephone"])
def test_no_page_is_wider_than_its_window(browser, notebook_page, size):
    assert browser.look(notebook_page, size=size).wide == 0


def test_light_and_dark(browser, notebook_page, tmp_path):
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    browser.look(notebook_page, picture=light)
    browser.look(notebook_page, dark=True, picture=dark)
    assert np.median(picture_of(light)) > 200 > 60 > np.median(picture_of(dark))


def test_the_index_loads(browser, tmp_path):
    index = write_index(tmp_path / "index.html", [{"href": "html/10.html", "number": "10", "title": "Data", "figure": png()}],
                        (png(60), "Main figure"))
    look = browser.look(index)
    assert (look.errors, look.requests, look.broken, look.unnamed, look.images) == ([], [], [], 0, 2)


def test_the_page_on_a_recording_loads(browser, saved_detector, voice, tmp_path):
    name = tmp_path / '"><img src=x onerror=alert(1)>&.wav'
    soundfile.write(name, voice(32.0, 60), RATE_HZ)
    assert main(["report", str(name), "--html", str(tmp_path / "out.html"), "--detector", str(saved_detector)]) == 0
    look = browser.look(tmp_path / "out.html")
    assert look.errors == [] and look.requests == [] and look.title == name.name
    assert look.images == 3 and look.broken == [] and look.unnamed == 0 and (look.players, look.silent) == (1, 0)


# --- that the look can find something ---------------------------------------------------------------------------------------


def test_faults_are_found(browser, tmp_path):
    page = page_of(tmp_path, '<img src="data:image/png;base64,AAAA" alt="torn"><img src="missing.png">'
                   '<audio controls src="data:audio/wav;base64,AAAA"></audio><div style="width: 4000px">x</div>'
                   '<script>console.error("spoken"); fetch("http://example.org/x"); undefinedName</script>')
    look = browser.look(page)
    assert look.broken == ["torn", ""] and look.unnamed == 1 and look.silent == 1 and look.wide > 2000
    assert any("spoken" in text for text in look.errors) and any("undefinedName" in text for text in look.errors)
    assert "http://example.org/x" in look.requests and any(text.endswith("missing.png") for text in look.requests)


def test_what_the_policy_forbids_is_an_error(browser, notebook_page, tmp_path):
    text = notebook_page.read_text(encoding="utf-8")
    assert "</main>" in text
    other = tmp_path / "other.html"
    other.write_text(text.replace("</main>", "<script>window.x = 1</script></main>"), encoding="utf-8")
    assert any("Content Security Policy" in error for error in browser.look(other).errors)


# --- print ------------------------------------------------------------------------------------------------------------------


def draws(pdf):
    """On how many pages each picture of a PDF is drawn."""
    content = pdf.read_bytes()
    objects = {int(number): body for number, body in re.findall(rb"(\d+) 0 obj\b(.*?)endobj", content, re.DOTALL)}
    found = {}
    for body in objects.values():
        if not re.search(rb"/Type\s*/Page\b", body):
            continue
        names = re.search(rb"/XObject\s*<<(.*?)>>", body, re.DOTALL)
        for number in {int(one) for one in re.findall(rb"(\d+) 0 R", names[1])} if names else ():
            if re.search(rb"/Subtype\s*/Image\b", objects[number]) and b"/SMask" not in objects[number][:20]:
                found[number] = found.get(number, 0) + 1
    return sorted(found.values())


def figures():
    """Six pictures that do not fit two to a page."""
    noise, found = np.random.default_rng(0).integers(0, 255, (6, 600, 600), dtype=np.uint8), ""
    for pixels in noise:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        found += f'<p>Text.</p><figure><img src="data:image/png;base64,{text64(buffer.getvalue())}" alt="noise"></figure>'
    return found


def test_print_cuts_no_figure(browser, tmp_path):
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    whole = browser.pdf(page_of(tmp_path, figures(), css), tmp_path / "whole.pdf")
    assert draws(whole) == [1] * 6
    tall = "figure { width: 18cm; height: 40cm } img { width: 18cm; height: 40cm; max-height: none !important }"
    cut = browser.pdf(page_of(tmp_path, figures(), css + tall), tmp_path / "cut.pdf")
    assert min(draws(cut)) >= 2, "this test can see a cut"


def test_pdf_of_reports_by_the_command(browser, notebook_page, tmp_path, capsys):
    assert main(["pdf", str(notebook_page), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "40.pdf").read_bytes().startswith(b"%PDF") and "40.pdf" in capsys.readouterr().out
    assert main(["pdf", str(tmp_path / "none.html"), "--out", str(tmp_path)]) == 1
    assert "is missing" in capsys.readouterr().err and not (tmp_path / "none.pdf").exists()
