"""What a page does in a real browser without a network: Playwright (extra `test`) drives Debian's Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = ["--no-sandbox", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--mute-audio"]
needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium")
LOOK = """async () => {
  const media = [...document.querySelectorAll("audio, video")];
  await Promise.all(media.map(player => player.readyState > 0 || player.error || new Promise(done => {
    for (const name of ["loadedmetadata", "error"]) player.addEventListener(name, done, {once: true});
    player.preload = "metadata"; player.load(); setTimeout(done, 5000);
  })));
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  return {
    title: document.title,
    images: images.length,
    broken: images.filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
    unnamed: images.filter(image => !image.alt.trim()).length,
    players: media.length,
    silent: media.filter(player => !(player.duration > 0)).length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
}"""


@dataclass(frozen=True)
class Look:
    """What a page did while it was loaded."""

    title: str
    images: int
    broken: list[str]  # alt texts of images that were not decoded
    unnamed: int  # images without alt text
    players: int
    silent: int  # players whose sound was not decoded
    wide: int  # pixels by which the page is wider than the window
    errors: list[str] = field(default_factory=list)  # console errors and warnings, exceptions
    requests: list[str] = field(default_factory=list)  # addresses asked for, beside the page's own and data


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)


def look(browser: Browser, path: Path, dark: bool = False, picture: Path | None = None,
         size: tuple[int, int] = (1280, 900), whole: bool = False) -> Look:
    """Load the page `path`, wait for its images and players, and say what happened; `picture` is a PNG to write."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light")
    errors, requests, own = [], [], Path(path).resolve().as_uri()
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(own)
    seen = page.evaluate(LOOK)
    if picture:
        page.screenshot(path=picture, full_page=whole)
    page.close()
    return Look(**seen, errors=errors, requests=[url for url in requests if not url.startswith(("data:", own))])


def remote_urls(html_text: str) -> list[str]:
    """Every address in a page's text that a browser would fetch from elsewhere on loading it; links do not count."""
    addresses, css = [], r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)"
    for tag in BeautifulSoup(html_text, "html.parser").find_all(True):
        for name, value in tag.attrs.items():
            value = value if isinstance(value, str) else " ".join(value)
            if name in ("src", "data", "poster", "background", "manifest", "formaction", "action") or (
                    name in ("href", "xlink:href") and tag.name not in ("a", "area")):
                addresses.append(value)
            elif name in ("srcset", "imagesrcset"):
                addresses += [part.split()[0] for part in value.split(", ") if part.split()]
            elif name == "srcdoc":
                addresses += remote_urls(value)
            elif name == "content" and tag.get("http-equiv", "").lower() == "refresh":
                addresses.append(value.partition("=")[2])
        styles = tag.get("style", "") + (tag.get_text() if tag.name == "style" else "")
        addresses += ["".join(pair) for pair in re.findall(css, styles, re.IGNORECASE)]
        if tag.name == "script":
            addresses += re.findall(r"(?:https?:|wss?:)?//[\w.-]+\.[\w./-]+", tag.get_text())
    cleaned = (re.sub(r"[\t\r\n]", "", address).strip(" '\"") for address in addresses)
    return [address for address in cleaned if re.match(r"(https?|ftp|wss?):|[/\\]{2}", address, re.IGNORECASE)]
