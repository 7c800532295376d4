"""Pages in a real browser: they load without a network and without an error, sound and pictures are there, print is
whole. Skipped, with the reason, where there is no Chromium; setup.sh installs Debian's."""

import io
import re

import numpy as np
import pandas as pd
import pytest
import soundfile
from PIL import Image

from lib.__main__ import main
from lib.report.html import TEMPLATES, export_notebook, print_page, write_index, write_table
from lib.settings import RATE_HZ
from tests.pages import chromium, look, needs_browser
from tests.test_html import cells, png, save, text64

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def notebook_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    executed = save(folder, cells())
    return export_notebook(executed, folder / "html/40.html", provenance={"seed": 0}, next=("41.html", "Next"))


def page_of(tmp_path, body, style=""):
    path = tmp_path / "page.html"
    path.write_text(f"<!DOCTYPE html><title>t</title><style>{style}</style>{body}", encoding="utf-8")
    return path


def picture_of(path):
    return np.asarray(Image.open(path).convert("L"), dtype=float)


# --- our pages ------------------------------------------------------------------------------------------------------


def test_a_notebook_page_loads_whole_and_silent(browser, notebook_page):
    seen = look(browser, notebook_page)
    assert seen.errors == [] and seen.requests == [] and seen.title == "Anomaly maps"
    assert seen.images == 4 and seen.broken == [] and seen.unnamed == 0 and (seen.players, seen.silent) == (1, 0)


@pytest.mark.parametrize("size", [(1280, 900), (390, 800)], ids=["desk", "telephone"])
def test_no_page_is_wider_than_its_window(browser, notebook_page, size):
    assert look(browser, notebook_page, size=size).wide == 0


def test_light_and_dark(browser, notebook_page, tmp_path):
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    look(browser, notebook_page, picture=light)
    look(browser, notebook_page, dark=True, picture=dark)
    assert np.median(picture_of(light)) > 200 > 60 > np.median(picture_of(dark))


def test_the_index_loads(browser, tmp_path):
    entries = [{"href": "html/10.html", "number": "10", "title": "Data", "figure": png()}]
    index = write_index(tmp_path / "index.html", entries, (png(60), "Main figure"))
    seen = look(browser, index)
    assert (seen.errors, seen.requests, seen.broken, seen.unnamed, seen.images) == ([], [], [], 0, 2)


def test_the_page_on_a_recording_loads(browser, saved_detector, voice, tmp_path):
    name, page = tmp_path / '"><img src=x onerror=alert(1)>&.wav', tmp_path / "out.html"
    soundfile.write(name, voice(32.0, 60), RATE_HZ)
    assert main(["report", str(name), "--html", str(page), "--detector", str(saved_detector)]) in (0, 1)
    seen = look(browser, page)
    assert seen.errors == [] and seen.requests == [] and seen.broken == [] and seen.unnamed == 0
    assert seen.images >= 3 and (seen.players, seen.silent) == (1, 0)


def test_a_table_of_many_recordings_loads(browser, tmp_path):
    table = pd.DataFrame({"recording": ['"><img src=x onerror=alert(1)>&.wav'] * 3, "anomaly": [0.1, 0.2, 0.3]})
    seen = look(browser, write_table(tmp_path / "table.html", table, "Recordings", "Three recordings", {"alpha": 0.05}))
    assert seen.errors == [] and seen.requests == [] and seen.title == "Recordings" and seen.images == 0


# --- that the look can find something -------------------------------------------------------------------------------


def test_faults_are_found(browser, tmp_path):
    page = page_of(tmp_path, '<img src="data:image/png;base64,AAAA" alt="torn"><img src="missing.png">'
                   '<audio controls src="data:audio/wav;base64,AAAA"></audio><div style="width: 4000px">x</div>'
                   '<script>console.error("spoken"); fetch("http://example.org/x"); undefinedName</script>')
    seen = look(browser, page)
    assert seen.broken == ["torn", ""] and seen.unnamed == 1 and seen.silent == 1 and seen.wide > 2000
    assert any("spoken" in text for text in seen.errors) and any("undefinedName" in text for text in seen.errors)
    assert "http://example.org/x" in seen.requests and any(text.endswith("missing.png") for text in seen.requests)


def test_what_the_policy_forbids_is_an_error(browser, notebook_page, tmp_path):
    text = notebook_page.read_text(encoding="utf-8")
    assert "</main>" in text
    other = tmp_path / "other.html"
    other.write_text(text.replace("</main>", "<script>window.x = 1</script></main>"), encoding="utf-8")
    assert any("Content Security Policy" in error for error in look(browser, other).errors)


# --- print ----------------------------------------------------------------------------------------------------------


def draws(pdf):
    """On how many pages each picture of a PDF is drawn."""
    content = pdf.read_bytes()
    objects = {int(number): body for number, body in re.findall(rb"(\d+) 0 obj\b(.*?)endobj", content, re.DOTALL)}
    pages = {}
    for body in objects.values():
        if not re.search(rb"/Type\s*/Page\b", body):
            continue
        names = re.search(rb"/XObject\s*<<(.*?)>>", body, re.DOTALL)
        for number in {int(reference) for reference in re.findall(rb"(\d+) 0 R", names[1])} if names else ():
            if re.search(rb"/Subtype\s*/Image\b", objects[number]) and b"/SMask" not in objects[number][:20]:
                pages[number] = pages.get(number, 0) + 1
    return sorted(pages.values())


def figures():
    """Six pictures that do not fit two to a page."""
    noise, text = np.random.default_rng(0).integers(0, 255, (6, 600, 600), dtype=np.uint8), ""
    for pixels in noise:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        picture = f'<img src="data:image/png;base64,{text64(buffer.getvalue())}" alt="noise">'
        text += f"<p>Text.</p><figure>{picture}</figure>"
    return text


def test_print_cuts_no_figure(tmp_path):
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    print_page(page_of(tmp_path, figures(), css), tmp_path / "whole.pdf")
    assert draws(tmp_path / "whole.pdf") == [1] * 6
    tall = "figure { width: 18cm; height: 40cm } img { width: 18cm; height: 40cm; max-height: none !important }"
    print_page(page_of(tmp_path, figures(), css + tall), tmp_path / "cut.pdf")
    assert min(draws(tmp_path / "cut.pdf")) >= 2, "this test can see a cut"


def test_pages_that_cannot_be_printed(notebook_page, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="is missing"):
        print_page(tmp_path / "none.html", tmp_path / "none.pdf")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt-get install chromium"):
        print_page(notebook_page, tmp_path / "none.pdf")
    assert not (tmp_path / "none.pdf").exists()
