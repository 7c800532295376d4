"""Owns the scoring of a whole manifest: in blocks that several processes share, that survive a kill, and that are merged checked.

Beside the score file OUT lies OUT.parts while it is in the making: plan.json (what is scored with what) and one JSON file a
finished block. A rerun with any number of processes does the blocks that are missing. When every clip of the manifest is
there once and no other, OUT is written and OUT.parts removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from lib.data.scorefiles import ScoreFileError, write_scores
from lib.engine import Engine
from lib.paths import atomic, clear_stale, digest_of, write_json
from lib.recordings.judging import audio_files, judged, load_detector

BLOCK = 32
"""Clips in a block: what a kill can cost, and the share of work that processes take in turns."""


def read_manifest(path: Path | str, root: Path | str | None = None) -> pd.DataFrame:
    """clip_id and path (absolute) of a table written by `python -m lib data --out`, or of every recording below a folder.

    Paths are below `root`; by default below the folder that the table remembers (Parquet), or the table's own (CSV).
    Raises ScoreFileError for a table without these columns, with repeated ids or naming files that are not there.
    """
    path = Path(path)
    if path.is_dir():
        return pd.DataFrame([(each.relative_to(path).as_posix(), str(each)) for each in audio_files(path)], columns=["clip_id", "path"])
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ScoreFileError(f"{path}: expected a folder, or a manifest in .parquet or .csv (python -m lib data --out): {error}") from None
    if not {"clip_id", "path"} <= set(table) or table.empty:
        raise ScoreFileError(f"{path}: expected rows with clip_id and path, found {len(table)} with {list(table)[:6]}")
    twice = table.clip_id[table.clip_id.duplicated()].tolist()
    if twice:
        raise ScoreFileError(f"{path}: expected every clip once, found {len(twice)} repeated ids: {twice[:3]}")
    base = Path(root or table.attrs.get("root") or path.parent)
    table = pd.DataFrame({"clip_id": table.clip_id.astype(str), "path": [str(base / each) for each in table.path]})
    absent = [each for each in table.path if not Path(each).is_file()]
    if absent:
        raise ScoreFileError(f"{path}: {len(absent)} of {len(table)} files are not there, such as {absent[0]}; name the folder of the "
                             "corpus with --root")
    return table


def score_manifest(table: pd.DataFrame, out: Path | str, engine: Engine, detector_folder: Path | str | None = None,
                   form: str = "asvspoof5", progress: Callable[[int, int], None] = lambda *_: None) -> pd.DataFrame | None:
    """Score every clip of `table` (clip_id, path) and write `out`, score up = bona fide; the table of results.

    Clips that cannot be scored are left out of `out` and listed, with the reason, in OUT.unscored.csv. In every process but
    the main one the result is None. Raises ScoreFileError where parts of another manifest or detector lie beside `out`.
    """
    out = Path(out)
    parts = out.with_name(out.name + ".parts")
    detector, limits, names = load_detector(detector_folder)
    key = digest_of([names["sha256"], table.to_numpy().tolist(), BLOCK])
    if engine.main:
        clear_stale(out.parent)
        _begun(parts, key, len(table))
    engine.wait()
    blocks = range(0, len(table), BLOCK)
    mine = [start for start in blocks[engine.rank :: engine.world] if not _part(parts, start).exists()]
    for number, start in enumerate(mine):
        rows = []
        for clip in table.iloc[start : start + BLOCK].itertuples():
            one = judged(detector, clip.path, limits)
            rows.append([clip.clip_id, one.anomaly, one.why if one.anomaly is None else ""])
        write_json(_part(parts, start), rows)
        progress(number + 1, len(mine))
    engine.wait()
    return _finished(parts, table, out, form) if engine.main else None


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.json"


def _begun(parts: Path, key: str, clips: int) -> None:
    plan = parts / "plan.json"
    if plan.exists() and json.loads(plan.read_text(encoding="utf-8"))["key"] != key:
        raise ScoreFileError(f"{parts} holds the unfinished scores of another manifest or detector: finish that run, or remove the "
                             "folder, or write to another --out")
    write_json(plan, {"key": key, "clips": clips, "block": BLOCK})


def merged(parts: Path, ids: list[str]) -> pd.DataFrame:
    """Columns clip_id, anomaly (NaN where there is none) and why, of all parts in the order of `ids`.

    Raises ScoreFileError for clips that are missing, there twice, or in no manifest.
    """
    rows = [row for path in _stored(parts) for row in json.loads(path.read_text(encoding="utf-8"))]
    found = pd.DataFrame(rows, columns=["clip_id", "anomaly", "why"]).astype({"anomaly": float})
    twice = found.clip_id[found.clip_id.duplicated()].tolist()
    missing, unknown = sorted(set(ids) - set(found.clip_id)), sorted(set(found.clip_id) - set(ids))
    if twice or missing or unknown:
        raise ScoreFileError(f"{parts}: expected each of {len(ids)} clips once, found {len(missing)} missing {missing[:3]}, {len(twice)} "
                             f"twice {twice[:3]}, {len(unknown)} unknown {unknown[:3]}; remove the part that is wrong and run again")
    return found.set_index("clip_id").loc[ids].reset_index()


def _stored(parts: Path) -> Iterator[Path]:
    return (path for path in sorted(parts.glob("*.json")) if path.stem.isdigit())


def _finished(parts: Path, table: pd.DataFrame, out: Path, form: str) -> pd.DataFrame:
    found = merged(parts, table.clip_id.tolist())
    scored, unscored = found[found.anomaly.notna()], found[found.anomaly.isna()]
    if scored.empty:
        raise ScoreFileError(f"none of {len(found)} clips could be scored; the first: {unscored.clip_id.iloc[0]}: {unscored.why.iloc[0]}")
    write_scores(out, scored.assign(score=-scored.anomaly), form)
    rest = out.with_name(out.name + ".unscored.csv")
    if len(unscored):
        with atomic(rest) as temporary:
            unscored[["clip_id", "why"]].to_csv(temporary, index=False)
    else:
        rest.unlink(missing_ok=True)
    shutil.rmtree(parts)
    return found
