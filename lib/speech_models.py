"""Owns the teachers that learnt speech by themselves from raw waveforms: torchaudio's wav2vec 2.0, HuBERT and WavLM as pyramids."""

from __future__ import annotations

from urllib.error import URLError

import torch
from torch import nn
from torch.nn import functional

from lib.settings import SPEECH_MODELS, Settings, View
from lib.spectrograms import channel_slice, hop_samples
from lib.whisper import WhisperPyramid, token_pyramid

BUNDLES = dict(zip(SPEECH_MODELS, ("WAV2VEC2_BASE", "HUBERT_BASE", "WAVLM_BASE_PLUS"), strict=True))
"""Of torchaudio.pipelines: base models, trained without labels on read English speech (WavLM on other recordings too)."""
HALF_WINDOW = 200
"""Half of the 400 samples behind one token: padded at both ends, so that a token is centred on its place."""


class SpeechModelPyramid(nn.Module):
    """A self-supervised speech model (Baevski et al. 2020; Hsu et al. 2021; Chen et al. 2022) after blocks 3, 6 and 9 of 12.

    (batch, channel, frequency, frame) -> list of three (batch, 768, 1, frame / 4, / 8, / 16), sizes rounded up, one row a level as
    of lib.whisper.WhisperPyramid and as much of the whole clip in each place. The waveform comes from the image's plane "wave". Which
    blocks are taken was not tried out: deeper ones know more of words than of sound.

    Raises ValueError for an image without "wave", ImportError where torchaudio cannot download the weights (360 MB, once).
    """

    taps = (3, 6, 9)

    def __init__(self, name: str, view: View, pretrained: bool = True) -> None:
        super().__init__()
        if "wave" not in view.channels:
            raise ValueError(f'the teacher {name} needs the image channel "wave": view.channels={"+".join((*view.channels, "wave"))}')
        self.plane, self.hop, self.hop_s = channel_slice(view, ("wave",))[0], hop_samples(view), view.hop_s
        self.model = pretrained_model(name) if pretrained else untrained_model(name)
        transformer = self.model.encoder.transformer
        transformer.layers = transformer.layers[: self.taps[-1]]  # what lies behind the last tap is never used
        # Weights as they are used, instead of a direction and a length that make them anew in every call.
        nn.utils.parametrize.remove_parametrizations(transformer.pos_conv_embed.conv, "weight")
        self.channels = (transformer.pos_conv_embed.conv.out_channels,) * len(self.taps)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        wave = x[:, self.plane, : self.hop].float().transpose(1, 2).flatten(1)
        outputs, _ = self.model.extract_features(functional.pad(wave, (HALF_WINDOW, HALF_WINDOW)), num_layers=self.taps[-1])
        return token_pyramid([outputs[tap - 1] for tap in self.taps], self.hop_s, x.shape[-1])


def untrained_model(name: str) -> nn.Module:
    """The same model with random weights; needs no network."""
    from torchaudio import models

    return {"wav2vec2": models.wav2vec2_base, "hubert": models.hubert_base, "wavlm": models.wavlm_base}[name]()


def pretrained_model(name: str) -> nn.Module:
    """torchaudio's model with its weights, from the cache of torch.hub or downloaded. Raises ImportError."""
    from torchaudio import pipelines

    try:
        return getattr(pipelines, BUNDLES[name]).get_model(dl_kwargs={"progress": False})
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: what was downloaded has another hash
        raise ImportError(f"the teacher {name} needs weights that torchaudio downloads from download.pytorch.org (360 MB, once), which "
                          f"failed: {str(error)[:200]}; with a network, run the same command again") from error


def token_teacher(settings: Settings, pretrained: bool = True) -> nn.Module:
    """The teacher without a frequency axis that the settings name, with its own weights or with random ones to be replaced."""
    if settings.network.teacher == "whisper":
        return WhisperPyramid(settings.view, settings.channel, pretrained)
    return SpeechModelPyramid(settings.network.teacher, settings.view, pretrained)
