"""Owns the embedded corpora: real speech inside Debian packages, found, unpacked without root, listed clip by clip; and
the fetching of other corpora."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from filelock import FileLock

from lib.paths import PACKAGES, temporary_prefix


class CorpusError(RuntimeError):
    """A corpus or package cannot be had here; the message says which and what to do."""


@dataclass(frozen=True)
class Source:
    """One recording as found in a package, before any processing."""

    path: Path
    corpus: str
    speaker: str  # the voice; voices that are or may be one person share a name
    split: str  # train, validation or test: a property of the voice, so that splits are speaker-disjoint
    licence: str
    text: str = ""
    clip_id: str = ""  # as its corpus spells it, where that is more than a path


@dataclass(frozen=True)
class Package:
    debian: str
    folder: str  # what the package must contain
    licence: str
    sources: Callable[[Path, str], Iterator[Source]]


VOICES = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"

# Which voice is in which split. A voice that is or may be the same person in two packages has one name and so one
# split; voices were compared by a speaker encoder, as notebook 11 does (highest pair across splits 0.87, klettres-nds
# in training and klettres-nl in validation; halves of one voice 0.94 to 0.99).
_TUXPAINT = {
    **{language: ("train", f"tuxpaint-{language}") for language in ("es", "fr", "el", "ca", "da")},
    **{language: ("validation", f"tuxpaint-{language}") for language in ("ro", "bg")},
    "ru": ("test", "tuxpaint-ru"),
    "be": ("test", "be-ru-voice"),
}
_KTUBERLING = {
    **{language: ("train", f"ktuberling-{language}") for language in ("lt", "fr", "ca", "el", "gl", "de", "en")},
    **{language: ("validation", f"ktuberling-{language}") for language in ("wa", "sl")},
    "uk": ("test", "ktuberling-uk"),
    "ru": ("test", "be-ru-voice"),
}
_KLETTRES = {
    **{language: ("train", f"klettres-{language}")
       for language in ("ml", "hu", "he", "ar", "lt", "nds", "de", "fr", "en")},
    **{language: ("validation", f"klettres-{language}") for language in ("uk", "nl", "da")},
    **{language: ("test", f"klettres-{language}") for language in ("pt_BR", "nb", "en_GB")},
}
_ASTERISK = {
    "en": ("train", "asterisk-en-es", "CC-BY-SA-3.0", "en_US_f_Allison"),
    "es": ("train", "asterisk-en-es", "CC-BY-SA-3.0", "es_MX_f_Allison"),
    "fr": ("train", "asterisk-fr", "CC-BY-SA-3.0", "fr_CA_f_June"),
    "it": ("validation", "asterisk-it", "CC-BY-3.0", "it_IT_m_Carlo"),
    "ru": ("test", "asterisk-ru", "CC-BY-3.0", "ru_RU_f_IvrvoiceRU"),
}
_NOT_SPEECH = re.compile(r"beep|tone|silence|tt-monkeys|confbridge-(join|leave)|glorious|ding|ring")


def _festvox_ru(root: Path, licence: str) -> Iterator[Source]:
    voice = root / VOICES
    lines = (voice / "etc" / "txt.done.data").read_text(encoding="utf-8").splitlines()
    texts = dict(re.match(r'\(\s*(\S+)\s+"(.*)"', line).groups() for line in lines if line.startswith("("))
    for path in sorted((voice / "wav").glob("ru_*.wav")):
        yield Source(path, "festvox-ru", "festvox-ru", "test", licence, texts.get(path.stem, ""))


def _fillets(root: Path, licence: str) -> Iterator[Source]:
    # The file name's role letter names the character: m and v are the two leads, the others minor.
    for path in sorted((root / "usr/share/games/fillets-ng/sound").glob("*/cs/*.ogg")):
        role = re.match(r"[^-]+-(m|v|x|hs|r|pap)-", path.name)
        if role:
            yield Source(path, "fillets-cs", f"fillets-{role[1]}", "train", licence)


def _asterisk(language: str) -> Callable[[Path, str], Iterator[Source]]:
    def sources(root: Path, licence: str) -> Iterator[Source]:
        split, speaker, _, folder = _ASTERISK[language]
        for path in sorted((root / "usr/share/asterisk/sounds" / folder).rglob("*.g722")):
            if not _NOT_SPEECH.search(str(path.relative_to(root))):
                yield Source(path, f"asterisk-{language}", speaker, split, licence)

    return sources


def _tuxpaint(root: Path, licence: str) -> Iterator[Source]:
    for path in sorted((root / "usr/share/tuxpaint/stamps").rglob("*_desc_*.ogg")):
        language = path.stem.rsplit("_desc_", 1)[1]
        if language in _TUXPAINT:
            split, speaker = _TUXPAINT[language]
            yield Source(path, "tuxpaint", speaker, split, licence)


def _ktuberling(root: Path, licence: str) -> Iterator[Source]:
    for language, (split, speaker) in sorted(_KTUBERLING.items()):
        for path in sorted((root / "usr/share/ktuberling/sounds" / language).glob("*")):
            if path.suffix in (".ogg", ".wav"):
                yield Source(path, "ktuberling", speaker, split, licence)


def _klettres(root: Path, licence: str) -> Iterator[Source]:
    for language, (split, speaker) in sorted(_KLETTRES.items()):
        for path in sorted((root / "usr/share/klettres" / language).glob("*/*.ogg")):
            yield Source(path, "klettres", speaker, split, licence)


EMBEDDED: tuple[Package, ...] = (
    Package("festvox-ru", VOICES + "/wav", "BSD-like", _festvox_ru),
    Package("fillets-ng-data-cs", "usr/share/games/fillets-ng/sound", "GPL-2", _fillets),
    *(
        Package(f"asterisk-core-sounds-{language}-g722", f"usr/share/asterisk/sounds/{folder}", licence,
                _asterisk(language))
        for language, (_, _, licence, folder) in _ASTERISK.items()
    ),
    Package("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", "GPL-2", _tuxpaint),
    Package("ktuberling-data", "usr/share/ktuberling/sounds", "GPL-2+", _ktuberling),
    Package("klettres-data", "usr/share/klettres", "GPL-2+", _klettres),
)


def package_root(package: Package) -> Path:
    """The folder that plays the part of / for `package`: / where it is installed, else a copy fetched here.

    The archive is unpacked into a temporary folder and renamed, so an interrupted fetch leaves nothing behind.
    Raises CorpusError where Debian's package client is missing or has no such package.
    """
    root = PACKAGES / package.debian
    if (root / package.folder).is_dir():
        return root
    if (Path("/") / package.folder).is_dir():
        return Path("/")
    hint = f"expected Debian's apt and the package {package.debian}; on other systems use CORPUS=librispeech"
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise CorpusError(f"cannot fetch {package.debian}: apt-get or dpkg-deb is missing; {hint}")
    PACKAGES.mkdir(parents=True, exist_ok=True)
    with FileLock(PACKAGES / ".lock"):  # one process fetches; what waits here finds its work done
        if not (root / package.folder).is_dir():
            _fetch(package, root, hint)
    return root


def _fetch(package: Package, root: Path, hint: str) -> None:
    with tempfile.TemporaryDirectory(dir=PACKAGES, prefix=temporary_prefix()) as name:
        folder = Path(name)
        done = subprocess.run(["apt-get", "download", "-q", package.debian], cwd=folder, capture_output=True, text=True)
        archives = list(folder.glob("*.deb"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise CorpusError(f"cannot fetch {package.debian}: {reason}; run `apt-get update` once, or {hint}")
        subprocess.run(["dpkg-deb", "-x", archives[0], folder / "root"], check=True)
        if not (folder / "root" / package.folder).is_dir():
            raise CorpusError(f"{archives[0].name} holds no {package.folder}: another release of it? {hint}")
        shutil.rmtree(root, ignore_errors=True)
        (folder / "root").rename(root)


def embedded_sources(hold_out: tuple[str, ...] = ()) -> list[Source]:
    """Every recording of the embedded corpora, in a fixed order; all voices of the collections `hold_out` are test
    voices, so that these are a new source. Raises CorpusError for an unknown collection."""
    sources: list[Source] = []
    for package in EMBEDDED:
        root = package_root(package)
        own = list(package.sources(root, package.licence))
        if not own:
            raise CorpusError(f"{package.debian} is unpacked under {root} but holds no recordings where expected")
        sources += own
    known = {source.corpus.split("-")[0] for source in sources}
    if unknown := set(hold_out) - known:
        raise CorpusError(f"data.hold_out: expected some of {', '.join(sorted(known))}, found {sorted(unknown)[0]!r}")
    voices = {source.speaker for source in sources if source.corpus.split("-")[0] in hold_out}
    return [replace(source, split="test") if source.speaker in voices else source for source in sources]


def embedded_manifest() -> pd.DataFrame:
    """The embedded corpora in the form of a public one (lib.data.public.COLUMNS), with `voice`."""
    table = pd.DataFrame([vars(source) for source in embedded_sources()])
    table["clip_id"] = [f"{row.corpus}/{'-'.join(row.path.parts[-3:])}" for row in table.itertuples()]
    return table.assign(voice=table.speaker, role="bonafide", label="bonafide", generator="", family="", parent="")


def download(name: str, folder: Path, **options: str) -> None:
    """Fetch a corpus of `torchaudio.datasets` by its class name into `folder`. Raises what torchaudio does."""
    if not name:
        raise ValueError("its terms are to be accepted by its user")
    import torchaudio

    folder.mkdir(parents=True, exist_ok=True)
    getattr(torchaudio.datasets, name)(str(folder), download=True, **options)


def phone_labels(clip_stem: str) -> list[tuple[float, float, str]]:
    """Phone labels of a festvox-ru recording: (start_s, end_s, phone), from the package's `lab` folder."""
    path = package_root(EMBEDDED[0]) / VOICES / "lab" / f"{clip_stem}.lab"
    rows, start = [], 0.0
    for line in path.read_text().splitlines():
        parts = line.split()
        if len(parts) == 3:
            rows.append((start, float(parts[0]), parts[2]))
            start = float(parts[0])
    return rows
