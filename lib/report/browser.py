"""Owns what is asked of a browser: pages as PDF, and what a page does when it is loaded without a network.

Headless Chromium is spoken to in its DevTools protocol over a pipe, so that no driver and no port are needed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from lib.paths import atomic

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MEND = "Debian: apt-get install --no-install-recommends chromium"
PAGE_S = 60.0
LAUNCH = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""
"""Chromium reads commands from descriptor 3 and writes answers to 4."""
LOOK = """(async () => {
  const media = [...document.querySelectorAll("audio, video")];
  await Promise.all(media.map(one => one.readyState > 0 || one.error || new Promise(done => {
    for (const name of ["loadedmetadata", "error"]) one.addEventListener(name, done, {once: true});
    one.preload = "metadata"; one.load(); setTimeout(done, 5000);
  })));
  const images = [...document.images];
  await Promise.all(images.map(one => one.decode().catch(() => 0)));
  return {
    title: document.title,
    images: images.length,
    broken: images.filter(one => !one.complete || !one.naturalWidth).map(one => one.alt),
    unnamed: images.filter(one => !one.alt.trim()).length,
    players: media.length,
    silent: media.filter(one => !(one.duration > 0)).length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
})()"""


class BrowserError(RuntimeError):
    """No browser, or it did not do what was asked; the message says what to do."""


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
    errors: list[str] = field(default_factory=list)  # console errors and warnings, exceptions, blocked loads
    requests: list[str] = field(default_factory=list)  # addresses asked for, beside the page's own and data


def executable() -> str:
    """Path of a Chromium. Raises BrowserError, saying how to get one, where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    raise BrowserError(f"expected one of {', '.join(NAMES)} on the PATH, found none. {MEND}")


class Browser:
    """A headless Chromium without a network, as a context: `with Browser() as browser: browser.look(path)`."""

    def __enter__(self) -> Browser:
        program, self._folder = executable(), tempfile.mkdtemp(prefix="pages-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [program, "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--mute-audio",
                   "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   "--disable-dev-shm-usage", "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND",
                   f"--user-data-dir={self._folder}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses its sandbox to root; only our own pages are opened
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]
        self._process = subprocess.Popen([sys.executable, "-ISc", LAUNCH, *map(str, theirs), *command], pass_fds=theirs,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                         env=os.environ | {"HOME": self._folder})
        for end in (to_read, to_write, *theirs):
            os.close(end)
        self._buffer, self._number, self._events = b"", 0, []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- what is asked ----------------------------------------------------------------------------------------------------

    def look(self, page: Path | str, dark: bool = False, picture: Path | str | None = None,
             size: tuple[int, int] = (1280, 900), whole: bool = False) -> Look:
        """Load `page`, wait for its images and players, and say what happened.

        `picture` writes a PNG of the window of `size`, or of the `whole` page; `dark` asks for the dark look.
        """
        session = self._open(page, dark, size)
        found = self._call("Runtime.evaluate", session, expression=LOOK, awaitPromise=True, returnByValue=True)["result"]["value"]
        if picture:
            shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=whole)
            with atomic(picture) as temporary:
                Path(temporary).write_bytes(base64.b64decode(shot["data"]))
        errors, requests = self._heard(session, Path(page).resolve().as_uri())
        self._shut(session)
        return Look(**found, errors=errors, requests=requests)

    def pdf(self, page: Path | str, target: Path | str) -> Path:
        """Print `page` on A4 as the PDF `target`, whole or not at all."""
        session = self._open(page, False, (1280, 900))
        self._call("Runtime.evaluate", session, expression=LOOK, awaitPromise=True, returnByValue=True)
        sheet = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True, "printBackground": True,
                 "generateTaggedPDF": True, "displayHeaderFooter": False}
        content = base64.b64decode(self._call("Page.printToPDF", session, **sheet)["data"])
        self._shut(session)
        with atomic(target) as temporary:
            Path(temporary).write_bytes(content)
        return Path(target)

    # --- the protocol -----------------------------------------------------------------------------------------------------

    def _open(self, page: Path | str, dark: bool, size: tuple[int, int]) -> str:
        page = Path(page).resolve()
        if not page.is_file():
            raise BrowserError(f"{page} is missing; make the reports first: make study")
        self._events.clear()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        self._call("Emulation.setDeviceMetricsOverride", session, width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        look = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", session, features=look)
        self._call("Page.navigate", session, url=page.as_uri())
        until = time.monotonic() + PAGE_S
        while not any(event["method"] == "Page.loadEventFired" and event.get("sessionId") == session for event in self._events):
            self._take(until, f"load {page.name}")
        return session

    def _shut(self, session: str) -> None:
        self._call("Page.close", session)
        self._events.clear()

    def _heard(self, session: str, own: str) -> tuple[list[str], list[str]]:
        errors, requests = [], []
        for event in (event for event in self._events if event.get("sessionId") == session):
            method, given = event["method"], event["params"]
            if method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
                errors.append(" ".join(str(one.get("value", one.get("description", ""))) for one in given["args"]))
            elif method == "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                errors.append(details.get("exception", {}).get("description", details["text"]))
            elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                errors.append(given["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                address = given["request"]["url"]
                if not address.startswith("data:") and address.partition("#")[0] != own:
                    requests.append(address)
        return errors, requests

    def _call(self, method: str, session: str = "", **given: object) -> dict[str, object]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": given} | ({"sessionId": session} if session else {})
        text, until = json.dumps(message).encode() + b"\0", time.monotonic() + PAGE_S
        while text:
            text = text[os.write(self._write, text):]
        while (answer := self._take(until, method)).get("id") != self._number:
            pass
        if "error" in answer:
            raise BrowserError(f"the browser refused {method}: {answer['error'].get('message', '')}")
        return answer["result"]

    def _take(self, until: float, what: str) -> dict[str, object]:
        """The next message; events are kept."""
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise BrowserError(f"the browser did not {what} within {PAGE_S:.0f} s; close other programs and try again")
            got = os.read(self._read, 1 << 20)
            if not got:
                raise BrowserError(f"the browser stopped before it could {what}. Is it whole? {MEND}")
            self._buffer += got
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message
