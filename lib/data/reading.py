"""Owns the reading of clips through the shared channel: whole, and in random crops."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch

from lib.data.audio import read_audio
from lib.data.channel import apply_channel
from lib.paths import DATA
from lib.settings import RATE_HZ, Channel


def voice_weights(voices: pd.Series) -> np.ndarray | None:
    """Chance of each clip to be drawn, (clips,): each voice in proportion to the root of its number of clips, so that a few
    large voices do not drown the small ones. None, all alike, where there is one voice."""
    if voices.nunique() < 2:
        return None
    weights = voices.map(voices.value_counts()).to_numpy(float) ** -0.5
    return weights / weights.sum()


class ClipReader:
    """Clips after the shared channel, read when asked for and kept in memory only up to a limit.

    Memory stays flat however long the corpus is; `limit_bytes` only saves reading again.
    """

    def __init__(self, clips: pd.DataFrame, channel: Channel, root: Path = DATA, limit_bytes: int = 600_000_000) -> None:
        self.paths = [Path(root) / path for path in clips.path]
        self.weights = voice_weights(clips.speaker)
        self.channel, self.limit = channel, limit_bytes
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def clean(self, index: int) -> np.ndarray:
        """One clip through the channel without its noise, (samples,) float32."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        audio, rate_hz = soundfile.read(self.paths[index], dtype="float32")
        if rate_hz != RATE_HZ:
            raise ValueError(f"{self.paths[index]}: expected {RATE_HZ} Hz, found {rate_hz}; prepare the clips again")
        audio = apply_channel(audio, self.channel, noise=False)[0]
        self._kept[index] = audio
        self._bytes += audio.nbytes
        worker = torch.utils.data.get_worker_info()
        limit = self.limit / (worker.num_workers if worker else 1)
        while self._bytes > limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return audio

    def crops(self, batch: int, samples: int, random: np.random.Generator, rows: slice = slice(None)) -> np.ndarray:
        """Random crops, (batch, samples) float32, without noise; a shorter clip is repeated up to the length.

        Every clip of a voice is as likely as the next, voices by the root of their number of clips (`voice_weights`).
        Only `rows` are read, the others stay zero: what is drawn from `random` does not depend on what is read, so that
        several processes can share one batch.
        """
        result = np.zeros((batch, samples), dtype=np.float32)
        indices, places = random.choice(len(self), batch, p=self.weights), random.random(batch)
        for row in range(batch)[rows]:
            audio = self.clean(int(indices[row]))
            start = int(places[row] * max(1, len(audio) - samples + 1))
            crop = audio[start : start + samples]
            result[row] = crop if len(crop) == samples else np.resize(crop, samples)
        return result


class PreparedClips(Sequence):
    """Clips after the shared channel, each read anew when asked for, so that memory does not grow with their number."""

    def __init__(self, paths: list[Path], channel: Channel) -> None:
        self.paths, self.channel = paths, channel

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice) -> tuple[np.ndarray, np.ndarray] | PreparedClips:
        if isinstance(index, slice):
            return PreparedClips(self.paths[index], self.channel)
        return apply_channel(read_audio(self.paths[index], strict=False)[0], self.channel)
