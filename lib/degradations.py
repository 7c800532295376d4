"""Owns what can happen to a recording on its way: codecs, noise, rooms, rates, levels, cuts, one named condition each."""

from __future__ import annotations

import functools
import io
import subprocess
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.signal

from lib import metrics, seeds
from lib.channel import FRAME, active_frames, apply_channel, frame_levels
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    from lib.abstention import Known
    from lib.detector import Detector
    from lib.study import Study

Degradation = Callable[..., np.ndarray]  # (audio (samples,), random stream) -> audio


class MissingEncoder(RuntimeError):
    """This machine cannot make a codec condition; the message says what is missing."""


def ffmpeg_codec(audio: np.ndarray, _: np.random.Generator, codec: str, container: str, rate_hz: int = RATE_HZ,
                 kbps: int = 0) -> np.ndarray:
    """A round trip through one of ffmpeg's encoders, (samples,) -> the same length; the delay of the codec is undone.

    Raises MissingEncoder where ffmpeg or the encoder is missing.
    """
    import soundfile

    wav = io.BytesIO()
    soundfile.write(wav, audio, RATE_HZ, format="WAV", subtype="PCM_16")
    quality = ["-b:a", f"{kbps}k"] if kbps and container != "g722" else []
    quiet = ["ffmpeg", "-hide_banner", "-loglevel", "error"]
    encode = [*quiet, "-f", "wav", "-i", "-", "-ar", str(rate_hz), "-ac", "1", "-c:a", codec, *quality, "-f", container, "-"]
    # Raw telephone codecs carry no header: the decoder has to be told. G.722 below 64 kb/s drops bits of every codeword.
    raw = {"g722": ["-bits_per_codeword", str((kbps or 64) // 8), "-f", "g722"],
           "mulaw": ["-f", "mulaw", "-ar", str(rate_hz), "-ac", "1"]}.get(container, [])
    decode = [*quiet, *raw, "-i", "-", "-f", "f32le", "-ar", str(RATE_HZ), "-ac", "1", "-"]
    try:
        coded = subprocess.run(encode, input=wav.getvalue(), capture_output=True, check=True).stdout
        decoded = subprocess.run(decode, input=coded, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise MissingEncoder("codec conditions need ffmpeg (apt-get install ffmpeg)") from None
    except subprocess.CalledProcessError as error:
        raise MissingEncoder(f"ffmpeg cannot make {codec}: {error.stderr.decode(errors='replace').strip()[-200:]}") from None
    result = np.frombuffer(decoded, dtype=np.float32)
    lags = scipy.signal.correlate(result[: 4 * RATE_HZ], audio[: 4 * RATE_HZ], mode="full", method="fft")
    delay = max(0, int(np.argmax(np.abs(lags))) - min(len(audio), 4 * RATE_HZ) + 1)
    result = result[min(delay, 4000) :][: len(audio)]
    return np.pad(result, (0, len(audio) - len(result))).astype(np.float32)


def noise(audio: np.ndarray, random: np.random.Generator, snr_db: float, colour: str = "white") -> np.ndarray:
    """Additive white or pink noise at a signal-to-noise ratio over the whole clip."""
    drawn = random.standard_normal(len(audio))
    if colour == "pink":
        spectrum = np.fft.rfft(drawn)
        drawn = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), len(audio))
    return _mixed(audio, drawn, snr_db)


def babble(audio: np.ndarray, random: np.random.Generator, snr_db: float, voices: Sequence[np.ndarray], talkers: int = 6) -> np.ndarray:
    """`talkers` of the recordings `voices` at equal levels, each from a random place, behind the clip."""
    drawn = np.zeros(len(audio))
    for index in random.permutation(len(voices))[:talkers]:
        one = np.tile(voices[index], -(-len(audio) // len(voices[index])))
        drawn += np.roll(one, int(random.integers(len(one))))[: len(audio)] / (np.sqrt(np.mean(one**2)) + 1e-9)
    return _mixed(audio, drawn, snr_db)


def _mixed(audio: np.ndarray, drawn: np.ndarray, snr_db: float) -> np.ndarray:
    scale = np.sqrt(np.mean(audio**2) / (np.mean(drawn**2) + 1e-20)) * 10 ** (-snr_db / 20)
    return (audio + scale * drawn).astype(np.float32)


def room(audio: np.ndarray, random: np.random.Generator, rt60_s: float) -> np.ndarray:
    """Convolution with a synthetic room: exponentially decaying noise behind a direct path."""
    length = int(rt60_s * RATE_HZ)
    tail = random.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail *= 0.5 / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return scipy.signal.oaconvolve(audio, tail)[: len(audio)].astype(np.float32)


def resampled(audio: np.ndarray, _: np.random.Generator, rate_hz: int) -> np.ndarray:
    import soxr

    there = soxr.resample(audio.astype(np.float32), RATE_HZ, rate_hz, quality="HQ")
    back = soxr.resample(there, rate_hz, RATE_HZ, quality="HQ")[: len(audio)]
    return np.pad(back, (0, len(audio) - len(back)))


def tilted(audio: np.ndarray, _: np.random.Generator, db_per_octave: float) -> np.ndarray:
    spectrum = np.fft.rfft(audio)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(audio), 1 / RATE_HZ), 60) / 1000)
    return np.fft.irfft(spectrum * 10 ** (db_per_octave * octaves / 20), len(audio)).astype(np.float32)


def low_passed(audio: np.ndarray, _: np.random.Generator, edge_hz: float) -> np.ndarray:
    return scipy.signal.sosfiltfilt(scipy.signal.butter(8, edge_hz, fs=RATE_HZ, output="sos"), audio).astype(np.float32)


def cut(audio: np.ndarray, random: np.random.Generator, seconds: float) -> np.ndarray:
    """A random stretch of the clip, or the whole of it where it is shorter."""
    length = round(seconds * RATE_HZ)
    start = int(random.integers(0, max(1, len(audio) - length + 1)))
    return audio[start : start + length]


def joined(audio: np.ndarray, _: np.random.Generator, seconds: float, other: np.ndarray) -> np.ndarray:
    """The clip and another one of the same source behind it, again and again up to `seconds`: the study's own clips are cropped
    to 5 s."""
    both = np.concatenate([audio, other])
    return np.tile(both, -(-round(seconds * RATE_HZ) // len(both)))[: round(seconds * RATE_HZ)]


def first(audio: np.ndarray, _: np.random.Generator, seconds: float) -> np.ndarray:
    return audio[: round(seconds * RATE_HZ)]


def silence(audio: np.ndarray, _: np.random.Generator, seconds: float, inside: bool = False) -> np.ndarray:
    """Digital silence before the clip, or in the middle of it, at its quietest frame there."""
    at = 0
    if inside:
        third = len(audio) // 3 // FRAME
        at = (third + int(np.argmin(frame_levels(audio)[third : max(third + 1, 2 * third)]))) * FRAME
    return np.concatenate([audio[:at], np.zeros(round(seconds * RATE_HZ), np.float32), audio[at:]])


def pauses_cut(audio: np.ndarray, _: np.random.Generator, pause_db: float = 35.0) -> np.ndarray:
    """The clip without its pauses, at the ends and inside."""
    return audio[np.repeat(active_frames(audio, pause_db), FRAME)[: len(audio)]]


def pauses_muted(audio: np.ndarray, _: np.random.Generator, pause_db: float = 35.0) -> np.ndarray:
    """The clip with digital silence for its pauses: no noise floor is left between words."""
    mask = np.convolve(np.repeat(active_frames(audio, pause_db), FRAME)[: len(audio)], np.ones(81) / 81, mode="same")
    return (audio * mask).astype(np.float32)


def levelled(audio: np.ndarray, _: np.random.Generator, db: float = -26.0) -> np.ndarray:
    """The clip at one root mean square for all, in dB full scale."""
    return (audio * (10 ** (db / 20) / (np.sqrt(np.mean(audio.astype(np.float64) ** 2)) + 1e-9))).astype(np.float32)


def clipped(audio: np.ndarray, _: np.random.Generator, share: float) -> np.ndarray:
    """Clipped so that `share` of the samples is at full scale."""
    limit = np.quantile(np.abs(audio), 1 - share)
    return np.clip(audio, -limit, limit)


def gain(audio: np.ndarray, _: np.random.Generator, db: float) -> np.ndarray:
    return (audio * 10 ** (db / 20)).astype(np.float32)


def offset(audio: np.ndarray, _: np.random.Generator, level: float) -> np.ndarray:
    return (audio * (1 - level) + level).astype(np.float32)


def untouched(audio: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return audio


def transplanted(audio: np.ndarray, other: np.ndarray, taps: int = 511) -> np.ndarray:
    """`audio` (samples,) with the recording chain of `other`: its long-term spectrum, in thirds of an octave, its level and the
    noise floor of its pauses."""
    power = [_thirds(one) for one in (audio, other)]
    gain_at = np.sqrt(power[1][1] / power[0][1])
    hertz = np.concatenate([[0.0], power[0][0], [RATE_HZ / 2]])
    shape = scipy.signal.firwin2(taps, hertz, np.clip(np.concatenate([gain_at[:1], gain_at, gain_at[-1:]]), 0.03, 30.0), fs=RATE_HZ)
    moved = scipy.signal.oaconvolve(audio, shape, mode="same")
    moved *= np.sqrt(np.mean(other.astype(np.float64) ** 2) / (np.mean(moved**2) + 1e-20))
    floors = [10 ** (np.quantile(frame_levels(one), 0.05) / 10) for one in (moved, other)]
    hiss = seeds.stream(0, "floor", len(audio)).standard_normal(len(audio)) * np.sqrt(max(0.0, floors[1] - floors[0]))
    return (moved + hiss).astype(np.float32)


def _thirds(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre frequencies of thirds of an octave from 100 Hz to 7.2 kHz, and the mean power in each."""
    hertz, power = scipy.signal.welch(audio.astype(np.float64), RATE_HZ, nperseg=1024)
    centres = 100 * 2 ** (np.arange(19) / 3)
    around = [(hertz >= one * 2 ** (-1 / 6)) & (hertz < one * 2 ** (1 / 6)) for one in centres]
    means = [power[mask].mean() if mask.any() else np.interp(one, hertz, power) for one, mask in zip(centres, around)]
    return centres, np.array(means) + 1e-14


_p = functools.partial


def _coded(codec: str, container: str, **rate: int) -> Degradation:
    return _p(ffmpeg_codec, codec=codec, container=container, **rate)


CONDITIONS: dict[str, dict[str, Degradation]] = {
    "codec": {
        **{f"MP3 {kbps} kb/s": _coded("libmp3lame", "mp3", kbps=kbps) for kbps in (96, 64, 32, 16)},
        **{f"AAC {kbps} kb/s": _coded("aac", "adts", kbps=kbps) for kbps in (64, 32, 16)},
        **{f"Opus {kbps} kb/s": _coded("libopus", "ogg", kbps=kbps) for kbps in (32, 16, 8)},
        **{f"Vorbis {kbps} kb/s": _coded("libvorbis", "ogg", kbps=kbps) for kbps in (80, 48, 32)},
        **{f"G.722 {kbps} kb/s": _coded("g722", "g722", kbps=kbps) for kbps in (64, 48)},
        **{f"mu-law {kbps} kb/s": _coded("pcm_mulaw", "mulaw", rate_hz=rate) for kbps, rate in ((128, 16000), (64, 8000))},
    },
    "noise": {
        **{f"white {snr} dB": _p(noise, snr_db=snr) for snr in (30, 20, 10, 0)},
        **{f"pink {snr} dB": _p(noise, snr_db=snr, colour="pink") for snr in (30, 20, 10, 0)},
    },
    "room": {f"RT60 {rt60} s": _p(room, rt60_s=rt60) for rt60 in (0.2, 0.5, 1.0)},
    "rate": {f"{rate / 1000:g} kHz and back": _p(resampled, rate_hz=rate) for rate in (8000, 11025, 22050, 32000, 44100, 48000)},
    "length": {**{f"{seconds:g} s": _p(cut, seconds=seconds) for seconds in (0.5, 1.0, 2.0, 4.0)}, "10 s": _p(joined, seconds=10.0)},
    "silence": {"1 s of silence before": _p(silence, seconds=1.0), "1 s of silence inside": _p(silence, seconds=1.0, inside=True),
                "pauses cut": pauses_cut},
    "level": {"gain -20 dB": _p(gain, db=-20), **{f"clipped {share:.0%}": _p(clipped, share=share) for share in (0.01, 0.05, 0.2)}},
}
"""Conditions of notebook 42 by group; `robustness` adds the babble, which needs voices."""

SNRS_DB = (30, 20, 10, 0)

INTERVENTIONS: dict[str, dict[str, Degradation]] = {
    "none": {"untouched": untouched},
    "leading silence": {"0.7 s of silence before": _p(silence, seconds=0.7), "pauses cut": pauses_cut},
    "loudness": {"gain -20 dB": _p(gain, db=-20), "equal level": levelled},
    "DC": {"DC offset 0.05": _p(offset, level=0.05)},
    "bandwidth": {"low-pass 7 kHz": _p(low_passed, edge_hz=7000), "low-pass 5 kHz": _p(low_passed, edge_hz=5000)},
    "equaliser": {"tilt +1 dB/octave": _p(tilted, db_per_octave=1.0), "tilt -1 dB/octave": _p(tilted, db_per_octave=-1.0)},
    "sample rate": {f"{rate / 1000:g} kHz and back": _p(resampled, rate_hz=rate) for rate in (44100, 22050, 11025)},
    "codec": {"G.722": _coded("g722", "g722"), "Opus 24 kb/s": _coded("libopus", "ogg", kbps=24),
              "Vorbis 80 kb/s": _coded("libvorbis", "ogg", kbps=80), "Vorbis 48 kb/s": _coded("libvorbis", "ogg", kbps=48),
              "MP3 64 kb/s": _coded("libmp3lame", "mp3", kbps=64)},
    "length": {"first 2 s": _p(first, seconds=2.0)},
    "noise floor": {"pauses muted": pauses_muted, "noise floor 40 dB": _p(noise, snr_db=40), "noise floor 30 dB": _p(noise, snr_db=30)},
}
"""Confounds of notebook 11, each neutralised or injected: what tells recording chains apart and is not synthesis."""


def robustness(study: Study, talkers: int = 24) -> dict[str, dict[str, Degradation]]:
    """`CONDITIONS`, and babble of the multi-speaker experiment's bona fide training voices, which are in no test."""
    from lib.audio import read_audio
    from lib.paths import DATA

    clips = study.part("multi", "train")
    clips = clips.iloc[seeds.stream(0, "babble").permutation(len(clips))[:talkers]]
    voices = [read_audio(DATA / path, strict=False)[0] for path in clips.path]
    talk = {f"babble {snr} dB": _p(babble, snr_db=snr, voices=voices) for snr in SNRS_DB}
    return {group: names | (talk if group == "noise" else {}) for group, names in CONDITIONS.items()}


def degraded_scores(study: Study, detector: Detector, clips: pd.DataFrame, conditions: dict[str, Degradation],
                    limit: int = 40, known: Known | None = None, also: dict[str, Detector] | None = None) -> pd.DataFrame:
    """Anomaly of up to `limit` clips of each generator under each condition: `clip_id, generator, role, parent, speaker,
    condition, anomaly`; with `known`, also `outside`, whether the clip is outside what calibration covers; and a column
    of anomaly for each detector of `also`, which has the same networks and scores otherwise.

    A clip that a condition leaves without speech has no anomaly (NaN). A condition that cannot be made (a missing encoder) is
    left out and said.
    """
    from lib.audio import read_audio
    from lib.paths import DATA

    others = also or {}
    clips = clips.groupby("generator", sort=False).head(limit).reset_index(drop=True)
    audios = [read_audio(DATA / path, strict=False)[0] for path in clips.path]
    # The next clip of the same source, for conditions that need a second one.
    followers = np.zeros(len(clips), dtype=int)
    for index in clips.groupby("generator", sort=False).indices.values():
        followers[index] = np.roll(index, -1)
    rows = []
    for name, degrade in conditions.items():
        joins = getattr(degrade, "func", None) is joined

        def scored(index: int, degrade: Degradation = degrade, name: str = name, joins: bool = joins) -> tuple:
            given = {"other": audios[followers[index]]} if joins else {}
            touched = degrade(audios[index], seeds.stream(0, name, clips.clip_id[index]), **given)
            try:
                levels = detector.clip_residuals(*apply_channel(touched, study.settings.channel))[1]
                anomalies = [one.score_residuals(levels) for one in (detector, *others.values())]
            except ValueError:
                anomalies = [float("nan")] * (1 + len(others))
            return bool(known and known.outside(touched)), *anomalies

        try:
            for clip, found in zip(clips.itertuples(), list(study.side_by_side(scored, range(len(clips))))):
                rows.append((clip.clip_id, clip.generator, clip.role, clip.parent, clip.speaker, name, *found))
        except MissingEncoder as error:
            print(f"left out: {name}: {error}")
    table = pd.DataFrame(rows, columns=["clip_id", "generator", "role", "parent", "speaker", "condition", "outside", "anomaly", *others])
    return table if known else table.drop(columns="outside")


def intervention_table(scores: pd.DataFrame, interventions: dict[str, dict[str, Degradation]]) -> pd.DataFrame:
    """What each intervention does, from `degraded_scores`: one row an intervention.

    `shift` of the median anomaly of real speech in standard deviations of untouched real speech; `real told apart`, the AUC of
    touched against untouched real speech (0.5: the detector does not hear it); and the mean AUC over generators where both kinds
    are touched, real speech alone, or fakes alone. All compare with the row of `untouched`.
    """
    group_of = {name: group for group, names in interventions.items() for name in names}
    real = {name: part.anomaly.to_numpy() for name, part in scores[scores.role == "bonafide"].groupby("condition", sort=False)}
    fakes = {name: [one.anomaly.to_numpy() for _, one in part.groupby("generator", sort=False)]
             for name, part in scores[scores.role != "bonafide"].groupby("condition", sort=False)}
    base = next(iter(real))
    rows = []
    for name in real:
        mean = lambda one, others: float(np.mean([metrics.area_under_curve(-one, -other) for other in others]))  # noqa: E731
        rows.append({"confound": group_of[name], "intervention": name,
                     "shift": (np.median(real[name]) - np.median(real[base])) / real[base].std(),
                     "real told apart": metrics.area_under_curve(-real[base], -real[name]), "AUC, both": mean(real[name], fakes[name]),
                     "AUC, real only": mean(real[name], fakes[base]), "AUC, fakes only": mean(real[base], fakes[name])})
    return pd.DataFrame(rows)


def swapped_scores(study: Study, detector: Detector, clips: pd.DataFrame, limit: int = 20) -> pd.DataFrame:
    """Anomaly of real clips and of their copies, each with its own recording chain and with the other's: `generator, parent,
    speech, channel, anomaly`.

    The real clip goes through 22.05 kHz and back, a vocoder's rate, and takes the long-term spectrum, level and noise floor of
    its copy (`transplanted`); the copy takes those of its real parent. Words, voice and synthesis stay where they were.
    """
    from lib.audio import read_audio
    from lib.paths import DATA

    reals = clips[clips.role == "bonafide"].head(limit)
    audio_of = {clip.clip_id: read_audio(DATA / clip.path, strict=False)[0] for clip in reals.itertuples()}
    copies = clips[(clips.role == "copysynth") & clips.parent.isin(audio_of)]

    def scored(audio: np.ndarray) -> float:
        return detector.score_prepared(*apply_channel(audio, study.settings.channel))

    own = dict(zip(audio_of, study.side_by_side(scored, audio_of.values())))

    def swapped(copy: tuple[str, str]) -> tuple[float, float, float]:
        real, fake = audio_of[copy[0]], read_audio(DATA / copy[1], strict=False)[0]
        there = transplanted(resampled(real, seeds.stream(0, "swap"), 22050), fake)
        return scored(there), scored(fake), scored(transplanted(fake, real))

    rows = []
    pairs = list(zip(copies.parent, copies.path))
    for generator, (parent, _), found in zip(copies.generator, pairs, study.side_by_side(swapped, pairs)):
        values = (("real", "own", own[parent]), ("real", "of its copy", found[0]), ("copy", "own", found[1]),
                  ("copy", "of its real parent", found[2]))
        rows += [(generator, parent, speech, channel, value) for speech, channel, value in values]
    return pd.DataFrame(rows, columns=["generator", "parent", "speech", "channel", "anomaly"])


def swap_table(scores: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Medians of `swapped_scores` in standard deviations about the median of real speech with its own chain, with 95 % intervals
    over parents: one row a generator, speech and channel; and the AUC of that cell against real speech with its own chain."""
    own = scores[(scores.speech == "real") & (scores.channel == "own")].drop_duplicates("parent").set_index("parent").anomaly
    z = (scores.anomaly - own.median()) / own.std()
    rows = []
    for keys, part in scores.assign(z=z).groupby(["generator", "speech", "channel"], sort=False):
        values = part.z.to_numpy()
        picks = seeds.stream(0, "swap", *keys).integers(len(values), size=(max(100, resamples), len(values)))
        low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
        auc = metrics.area_under_curve(-own.to_numpy(), -part.anomaly.to_numpy())
        rows.append(dict(zip(("generator", "speech", "channel"), keys)) | {
            "median": float(np.median(values)), "low": float(low), "high": float(high), "AUC against real": auc})
    return pd.DataFrame(rows)
