"""`lib.report.html`: reports that load nothing, hide nothing and read well."""

import base64
import io
import re
import wave

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lib.report.html import POLICY, SCRIPT, export_notebook, notebook_facts, write_index, write_table
from tests.pages import remote_urls

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'


def png(width=40, colour="white"):
    Image.new("RGB", (width, 20), colour).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def text64(content):
    return base64.b64encode(content).decode()


def player():
    """What IPython.display.Audio leaves in a notebook."""
    with wave.open(buffer := io.BytesIO(), "wb") as file:
        file.setparams((1, 2, 8_000, 800, "NONE", ""))
        file.writeframes(bytes(1_600))
    return (f'\n<audio controls="controls">\n<source src="data:audio/wav;base64,{text64(buffer.getvalue())}" '
            'type="audio/wav" />\nYour browser does not support the audio element.\n</audio>\n')


def code(source, *outputs, tags=()):
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)}, execution_count=1)


def shown(metadata=None, **data):
    return new_output("display_data", {key.replace("_", "/"): value for key, value in data.items()},
                      metadata=metadata or {})


def cells():
    return [
        new_markdown_cell("# Anomaly maps\n\nWhere is the *fake* in a\nfake?\n\n*Reads* x. *Writes* y."),
        code("import os\nseed: int = 0  # seed of all", tags=["parameters"]),
        code("seed = 3", tags=["injected-parameters"]),
        code("secret = 1", tags=["remove-cell"]),
        new_markdown_cell("## The distance\n\nInline $d = 1 - \\cos\\theta$ and\n\n$$\n"
                          "\\mathcal{L} = \\sum_{l=1}^{3} \\frac{1}{h_l w_l} "
                          "\\lVert \\hat f_T - \\hat f_S \\rVert_2^2\n"
                          "$$"
                          "\n\n\\begin{align} a &= b \\\\ c &= d \\end{align}\n\n| a | b |\n|---|---|\n| 1 | $x<2$ |"),
        code("print('hello')", new_output("stream", name="stdout", text="hello <b>\n"),
             new_output("stream", name="stderr", text="a warning nobody wants\n")),
        new_markdown_cell("## Figures & sound\n\n### The gallery"),
        code("a", shown(image_png=text64(png()), text_plain="<Figure>", metadata={"alt": 'Map of "x" <1>'})),
        code("b", shown(image_png=text64(png(41)), metadata={"image/png": {"alt": "Second map"}})),
        code("c", shown(image_png=text64(png(42, "black"))), tags=["main-figure"]),
        code("s", shown(metadata={"alt": "A line"}, **{"image_svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'/>"})),
        code("d", shown(text_html=player(), text_plain="<Audio>")),
        code("e", shown(text_html='<table border="1" class="dataframe"><thead><tr><th>EER</th></tr></thead>'
                                  "<tbody><tr><td>4.2</td></tr></tbody></table>")),
        code("f", shown(text_html="<script>alert(3)</script><p>kept</p>"),
             shown(text_plain="progress", **{"application_vnd.jupyter.widget-view+json": {"model_id": "1"}}),
             shown(text_plain="jq", application_javascript="alert(4)")),
        code("g", shown(text_latex=r"$\alpha^2$")),
        new_markdown_cell("## The distance\n\nagain"),
        code("1/0", new_output("error", ename="ZeroDivisionError", evalue="x", traceback=["\x1b[31mZero <b>\x1b[0m"])),
        code("h", shown(text_markdown="The map finds **61 %**, $p<0.05$.", text_plain="<Markdown>"), tags=["finding"]),
    ]


def save(folder, content, name="40_anomaly_maps.ipynb", **metadata):
    nbformat.write(new_notebook(cells=content, metadata=metadata), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    executed = save(folder, cells(), papermill={"duration": 75.4})
    path = export_notebook(executed, folder / "new/40.html", previous=("30.html", "Score"), next=("41.html", HOSTILE),
                           provenance={"settings": "sha256 1234", "seed": 0, "versions": {"torch": "2.14"},
                                       HOSTILE: HOSTILE})
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_nothing_is_remote(page):
    assert remote_urls(str(page)) == []
    assert "cdn" not in str(page) and "unpkg" not in str(page)
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy == POLICY and "http:" not in policy and "https:" not in policy
    assert len(str(page)) < 40_000  # the page without figures is small


def test_only_our_script_is_there(page):
    assert [script.get_text() for script in page.find_all("script")] == [SCRIPT]
    assert not page.find(onerror=True) and "alert(3)" not in str(page) and "alert(4)" not in str(page)


def test_equations_are_mathml(page):
    math = page.find_all("math")
    assert [item["display"] for item in math[:3]] == ["inline", "block", "block"]
    assert len(math) == 6  # two in text, one environment, in a table, as an output, in the finding
    assert math[0]["alttext"] == r"d = 1 - \cos\theta" and "θ" in math[0].get_text()
    assert math[0].find("mspace") and "(1)" not in math[2].get_text()
    for item in math:
        item.extract()
    prose = " ".join(part.get_text() for part in page.select(".text_cell"))
    assert "$" not in prose and "\\" not in prose
    for item in math:  # leave the page as it was
        page.append(item)


def test_code_is_folded_but_parameters_are_not(page):
    folded = page.select("details.source")
    assert folded and not any(cell.has_attr("open") for cell in folded)
    assert "print" in folded[0].get_text() and "1 line" in folded[0].summary.get_text()
    everything = "".join(cell.get_text() for cell in folded)
    assert "seed" not in everything and "seed of all" in page.get_text()
    assert [label.get_text() for label in page.select(".label")] == ["Parameters", "Parameters of this run"]
    assert "secret" not in page.get_text()
    assert page.find("input", id="show-all")


def test_outputs(page):
    text = page.get_text()
    assert "hello <b>" in text and "nobody wants" not in text and "Zero <b>" in text
    assert "kept" in text and "progress" in text
    assert page.select_one(".celltag_finding .outputs").get_text().strip().startswith("The map finds 61 %")


def test_printed_lines_are_one_output_and_long_logs_are_folded(tmp_path):
    line = lambda text, name="stdout": new_output("stream", name=name, text=text)  # noqa: E731
    short = [line("epoch 1\n"), line("noise", "stderr"), line("10 %\r"), line("90 %\rdone\n"),
             shown(text_plain="table"), line("after\n")]
    long = [line(f"step {number}\n") for number in range(30)]
    executed = save(tmp_path, [new_markdown_cell("# T"), code("a", *short), code("b", *long)])
    page = BeautifulSoup(export_notebook(executed, tmp_path / "a.html").read_text(encoding="utf-8"), "html.parser")
    assert [one.get_text() for one in page.select("pre.stream")][:2] == ["epoch 1\ndone\n", "after\n"]
    folded = page.select("details.log")
    assert len(folded) == 1 and "30 lines" in folded[0].summary.get_text()
    assert folded[0].pre.get_text().count("step") == 30


def test_every_image_has_alt_text(page):
    images = page.find_all("img")
    assert [image["alt"] for image in images] == ['Map of "x" <1>', "Second map", "Figure: The gallery", "A line"]
    assert all(image["src"].startswith("data:image/png;base64,") for image in images[:3])
    assert base64.b64decode(images[3]["src"].removeprefix("data:image/svg+xml;base64,")).startswith(b"<svg")


def test_audio_is_kept(page):
    assert page.audio.has_attr("controls") and page.audio.source["src"].startswith("data:audio/wav;base64,")


def test_tables_scroll(page):
    tables = page.find_all("table")
    assert len(tables) == 2 and all(table.parent["class"] == ["scroll"] for table in tables)


def test_contents_lead_to_headings(page):
    entries = page.select("nav.toc li a")
    assert [entry.get_text() for entry in entries] == ["The distance", "Figures & sound", "The gallery", "The distance"]
    targets = [entry["href"][1:] for entry in entries]
    assert len(set(targets)) == 4
    for target in targets:
        assert page.find(id=target).name in ("h2", "h3")


def test_title_neighbours_and_provenance(page):
    assert page.title.get_text() == "Anomaly maps"
    assert page.find("a", rel="prev")["href"] == "30.html" and page.find("a", href="../index.html")
    assert page.find("a", rel="next").get_text() == f"Next{HOSTILE}"
    rows = {row.dt.get_text(): row.dd.get_text() for row in page.select(".provenance dl div")}
    assert rows == {"settings": "sha256 1234", "seed": "0", "versions": "torch 2.14", HOSTILE: HOSTILE}


def test_print_never_cuts_a_figure(page):
    printed = page.style.get_text().partition("@media print")[2]
    rule = re.search(r"([^{}]*)\{ break-inside: avoid", printed)[1]
    assert {"img", "figure", "table", "pre"} <= {part.strip() for part in rule.split(",")}
    assert "prefers-color-scheme: dark" in page.style.get_text()


def test_hostile_title(tmp_path):
    table = pd.DataFrame({"x": [HOSTILE]})
    html = write_table(tmp_path / "a.html", table, HOSTILE, HOSTILE).read_text(encoding="utf-8")
    page = BeautifulSoup(html, "html.parser")
    assert page.title.get_text() == page.h1.get_text() == page.td.get_text() == HOSTILE
    assert "<script>alert" not in html and not page.find(onerror=True) and "All notebooks" not in html
    executed = save(tmp_path, [new_markdown_cell("text")], name="a<b>.ipynb")
    html = export_notebook(executed, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<title>a&lt;b&gt;</title>" in html


def test_images_beside_the_notebook_and_attachments_are_embedded(tmp_path):
    (tmp_path / "near.png").write_bytes(png())
    cell = new_markdown_cell("## Near\n\n![](near.png) ![kept](attachment:in.png)")
    cell.attachments = {"in.png": {"image/png": text64(png(50))}}
    html = export_notebook(save(tmp_path, [cell]), tmp_path / "a.html").read_text(encoding="utf-8")
    images = BeautifulSoup(html, "html.parser").find_all("img")
    assert [image["src"] for image in images] == [f"data:image/png;base64,{text64(png(size))}" for size in (40, 50)]
    assert [image["alt"] for image in images] == ["Figure: Near", "kept"]


def test_remote_image_is_refused_and_the_old_page_stays(tmp_path):
    (tmp_path / "a.html").write_text("old")
    executed = save(tmp_path, [new_markdown_cell("![x](https://example.org/x.png)")])
    with pytest.raises(ValueError, match="loads nothing remote, not https://example.org"):
        export_notebook(executed, tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == "old"
    linked = save(tmp_path, [new_markdown_cell("[x](https://example.org/x.png) https://example.org")])
    export_notebook(linked, tmp_path / "a.html")


@pytest.mark.parametrize("tex", [r"\nosuchcommand{x}", "", r"\left( x"])
def test_equation_that_is_not_understood(tmp_path, tex):
    executed = save(tmp_path, [new_markdown_cell(f"## A\n\n$$ {tex} $$")])
    with pytest.warns(UserWarning, match="shown as TeX"):
        html = export_notebook(executed, tmp_path / "a.html").read_text(encoding="utf-8")
    assert BeautifulSoup(html, "html.parser").find("code", class_="tex").get_text() == tex


@pytest.mark.parametrize(("html", "found"), [
    ('<script src="https://a.org/x.js"></script>', ["https://a.org/x.js"]),
    ("<img src=//a.org/x.png>", ["//a.org/x.png"]),
    ('<img srcset="x.png 1x, HTTP://a.org/y.png 2x">', ["HTTP://a.org/y.png"]),
    ('<link rel="stylesheet" href="http://a.org/x.css">', ["http://a.org/x.css"]),
    ('<style>@import "https://a.org/x.css"; b{background:url( \'//a.org/x.png\' )}</style>',
     ["https://a.org/x.css", "//a.org/x.png"]),
    ('<p style="background:url(https://a.org/x.png)">', ["https://a.org/x.png"]),
    ('<meta http-equiv="refresh" content="0; url=https://a.org">', ["https://a.org"]),
    ('<iframe srcdoc="&lt;img src=https://a.org/x&gt;"></iframe>', ["https://a.org/x"]),
    ('<video poster="https://a.org/p"></video><object data="\\\\a.org/x">', ["https://a.org/p", "\\\\a.org/x"]),
    ('<svg><image xlink:href="https://a.org/x.svg"/></svg>', ["https://a.org/x.svg"]),
    ('<script>import("https://a.org/m.mjs")</script>', ["https://a.org/m.mjs"]),
    ('<img src="ht\ntps://a.org/x">', ["https://a.org/x"]),
    ('<a href="https://a.org">x</a><img src="x.png"><img src="data:image/png;base64,//aa">', []),
    ('<math xmlns="http://www.w3.org/1998/Math/MathML"></math>', []),
])
def test_remote_urls(html, found):
    assert remote_urls(html) == found


def test_facts(tmp_path):
    facts = notebook_facts(save(tmp_path, cells(), papermill={"duration": 75.4}))
    assert facts == {"title": "Anomaly maps", "question": "Where is the *fake* in a fake?", "seconds": 75.4,
                     "finding": "The map finds **61 %**, $p<0.05$.", "figure": png(42, "black"), "preset": ""}


def test_facts_of_an_almost_empty_notebook(tmp_path):
    absent = {"question": "", "finding": "", "seconds": None, "figure": None, "preset": ""}
    assert notebook_facts(save(tmp_path, [new_markdown_cell("# A\n## B\n\nno")])) == {"title": "A"} | absent
    assert notebook_facts(save(tmp_path, [])) == {"title": ""} | absent


def test_a_smoke_run_says_so_on_every_page_and_on_the_index(tmp_path):
    for preset in ("smoke", "study"):
        executed = save(tmp_path, cells(), papermill={"parameters": {"preset": preset}, "duration": 1.0})
        page = export_notebook(executed, tmp_path / "page.html")
        index = write_index(tmp_path / "index.html", [{"href": "x"}, {"href": "page.html", **notebook_facts(executed)}])
        for path in (page, index):
            banner = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").select_one("main > .banner")
            assert (preset == "smoke") == bool(banner) and (not banner or "mean nothing" in banner.get_text())


def test_cells_that_show_the_method_stay_open(tmp_path):
    executed = save(tmp_path, [code("loss = 1 - cosine", tags=["method"]), code("hidden = 1")])
    page = BeautifulSoup(export_notebook(executed, tmp_path / "a.html").read_text(encoding="utf-8"), "html.parser")
    assert page.select_one(".label").get_text() == "The method" and len(page.select("details.source")) == 1
    assert "loss = 1 - cosine" not in page.select_one("details.source").get_text()


def test_index(tmp_path):
    facts = notebook_facts(save(tmp_path, cells(), papermill={"duration": 75.4}))
    (tmp_path / "main.png").write_bytes(png(3_000))
    entries = [{"number": "40", "href": "html/40.html", **facts},
               {"number": "41", "href": "html/41 <x>.html", "title": HOSTILE, "question": HOSTILE, "finding": HOSTILE,
                "seconds": 4_000}]
    path = write_index(tmp_path / "index.html", entries, figure=(tmp_path / "main.png", "All scores"),
                       provenance={"seed": 0}, headline="<table><tr><td>EER</td></tr></table>")
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    assert remote_urls(str(page)) == [] and not page.find("script") and not page.find(onerror=True)
    assert "One-class" in page.h1.get_text() and page.title.get_text()
    first, second = page.select("ol.entries > li")
    assert first.a["href"] == "html/40.html" and first.h3.get_text() == "40 Anomaly maps"
    assert first.select_one(".question").get_text() == "Where is the fake in a fake?" and first.em
    assert first.select_one(".finding").math and first.strong and "ran in 75 s" in first.get_text()
    assert first.img["alt"] == "Main figure of Anomaly maps"
    assert HOSTILE in second.get_text() and "67 min" in second.get_text() and not second.img
    linked = write_index(tmp_path / "b.html", [{"href": "x", "finding": "[a](javascript:alert(1))"}])
    assert "javascript:" not in linked.read_text(encoding="utf-8")
    figure = page.select_one("figure img")
    assert figure["alt"] == "All scores"
    assert Image.open(io.BytesIO(base64.b64decode(figure["src"].partition(",")[2]))).width == 2_000
    assert page.select_one("section.headline .scroll table")
    assert page.select_one(".provenance dd").get_text() == "0"


def test_columns_of_words_are_marked_and_wrap_while_numbers_stay(tmp_path):
    head = "<thead><tr><th>claim</th><th>AUC</th><th>who</th></tr></thead>"
    frame = f"<table class='dataframe'>{head}<tbody>{{}}</tbody></table>"
    rows = "".join(f"<tr><td>{'a long claim ' * 5}</td><td>{value}</td><td>{who}</td></tr>"
                   for value, who in (("0.93 [0.88, 0.97]", ""), ("NaN", "us"), ("-1.2e-05", "")))
    write_index(tmp_path / "index.html", [], headline=frame.format(rows))
    table = BeautifulSoup((tmp_path / "index.html").read_text(), "html.parser").table
    for row in table.find_all("tr"):
        assert [cell.get("class") for cell in row.find_all(["td", "th"])] == [["words", "long"], None, ["words"]]
    css = re.search(r"<style>(.*?)</style>", (tmp_path / "index.html").read_text(), re.DOTALL)[1]
    assert re.search(r"\.words \{ text-align: left; white-space: normal;", css)
    joined = "<table><tr><td colspan='2'>words here</td></tr><tr><td>words</td><td>1</td></tr></table>"
    write_index(tmp_path / "joined.html", [], headline=joined)
    assert not BeautifulSoup((tmp_path / "joined.html").read_text(), "html.parser").find(class_="words")
