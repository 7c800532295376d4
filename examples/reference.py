"""Fills reports/reference from a finished run of the preset `full`: its tables, score files, the gallery, and the index
with the pages of the student's route, small enough for the repository. From the project's folder:

    PYTHONPATH=. python examples/reference.py reports"""

import argparse
import base64
import io
import re
import shutil
from pathlib import Path

from PIL import Image

from lib.paths import REFERENCE

ROUTE = ("05", "06", "21", "31", "40")
PICTURE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def smaller(found):
    """An embedded PNG as WebP, a third of its size."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB").save(stream, "WEBP", quality=78, method=6)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def copied(page, target, kept):
    """The page with small pictures, and without links to pages that are not `kept`."""
    text = PICTURE.sub(smaller, page.read_text(encoding="utf-8"))
    link = re.compile(r'<a [^>]*href="((?:html/|\.\./)?[^":#]+\.html)[^"]*"[^>]*>(.*?)</a>', re.S)
    text = link.sub(lambda found: found[0] if Path(found[1]).name in kept else found[2], text)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return len(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path)
    reports = parser.parse_args().reports
    for name, pattern in (("full", "tables/*.csv"), ("scores", "scores/*.csv.gz")):
        shutil.rmtree(REFERENCE / name, ignore_errors=True)
        (REFERENCE / name).mkdir(parents=True)
        for path in sorted(reports.glob(pattern)):
            shutil.copy(path, REFERENCE / name / path.name)
    shutil.copy(reports / "figures" / "40_gallery.png", REFERENCE / "gallery.png")
    pages = [path for path in sorted((reports / "html").glob("*.html")) if path.name.startswith(ROUTE)]
    kept, target = {"index.html", *(path.name for path in pages)}, REFERENCE / "html"
    shutil.rmtree(target, ignore_errors=True)
    size = copied(reports / "index.html", target / "index.html", kept)
    size += sum(copied(path, target / "html" / path.name, kept) for path in pages)
    print(f"{len(pages)} pages and the index, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
