import numpy as np
import pytest
import torch

from lib.model.images import FrontEnd, activity, frame_s, image, plane_count, plane_places, row_hz, transform_size
from lib.settings import RATE_HZ, Channel, View

VIEW, CHANNEL = View(), Channel()


def tone(hertz, seconds=1.0):
    return torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE_HZ)) / RATE_HZ).astype(np.float32))[
        None
    ]


def test_shape_and_axes():
    picture = image(tone(1000), VIEW, CHANNEL)
    assert picture.shape == (1, 10, VIEW.bins, 1 + RATE_HZ // 128)
    hertz = row_hz(VIEW, CHANNEL)
    assert hertz[0] == pytest.approx(62.5) and np.all(np.diff(hertz) == pytest.approx(31.25))
    assert frame_s(VIEW, 3) == pytest.approx([0, 0.008, 0.016])


@pytest.mark.parametrize("hertz", [250, 1000, 3000, 5500])
def test_a_tone_lies_on_its_row(hertz):
    level = image(tone(hertz), VIEW, CHANNEL)[0, 0, :, 30:90].mean(1)
    assert abs(row_hz(VIEW, CHANNEL)[int(level.argmax())] - hertz) <= 31.25


def test_level_equals_librosa():
    import librosa

    audio = torch.randn(1, RATE_HZ, generator=torch.Generator().manual_seed(0))
    ours = image(audio, View(planes=("level",)), CHANNEL)[0, 0]
    size = transform_size(VIEW, CHANNEL)
    theirs = np.abs(librosa.stft(audio[0].numpy(), n_fft=size, hop_length=128, pad_mode="constant"))[2 : 2 + VIEW.bins]
    assert np.abs(ours.numpy() - (np.log(theirs / np.sqrt(512) + 1e-5) + 5.5) / 1.8).max() < 1e-4


def test_phase_advance_of_a_bin_centred_tone_is_zero():
    picture = image(tone(1000), VIEW, CHANNEL)[0]
    row = int(np.argmin(np.abs(row_hz(VIEW, CHANNEL) - 1000)))
    assert picture[1, row, 20:100].min() > 0.999 and picture[2, row, 20:100].abs().max() < 0.03


def test_group_delay_of_a_centred_click_is_zero():
    click = torch.zeros(1, RATE_HZ)
    click[0, 128 * 40] = 1.0  # in the middle of frame 40
    picture = image(click, VIEW, CHANNEL)[0]
    assert picture[3, :, 40].min() > 0.999 and picture[4, :, 40].abs().max() < 0.03


def test_time_shift_shifts_the_image():
    audio = torch.randn(1, RATE_HZ, generator=torch.Generator().manual_seed(1))
    moved = torch.cat([torch.zeros(1, 128 * 5), audio], 1)
    one, two = image(audio, VIEW, CHANNEL), image(moved, VIEW, CHANNEL)
    assert torch.allclose(one[..., 6:100], two[..., 11:105], atol=1e-4)


def test_planes_by_name():
    assert plane_count(("level", "advance")) == 3
    assert plane_places(VIEW, ("level", "short")) == [0, 5]
    with pytest.raises(ValueError, match="unknown image planes"):
        plane_count(("colour",))


def test_a_front_end_gives_its_planes_the_same_from_audio_and_from_the_image():
    audio = torch.randn(2, RATE_HZ, generator=torch.Generator().manual_seed(2))
    picture = image(audio, VIEW, CHANNEL)
    for planes, places in ((("level",), [0]), (("pulse", "level"), [0, 6, 7, 8, 9]), ((), list(range(10)))):
        front = FrontEnd(VIEW, CHANNEL, planes)
        assert front.planes == len(places) and not front.state_dict()
        assert torch.equal(front(audio), picture[:, places]) and torch.equal(front(audio, picture), front(audio))


def test_an_image_network_sees_three_planes():
    audio = torch.randn(1, RATE_HZ, generator=torch.Generator().manual_seed(2))
    picture = image(audio, VIEW, CHANNEL)
    assert torch.equal(FrontEnd(VIEW, CHANNEL, colours=True)(audio), picture[:, [0, 1, 3]])
    assert torch.equal(FrontEnd(VIEW, CHANNEL, ("level",), colours=True)(audio), picture[:, [0, 0, 0]])


def test_too_short():
    with pytest.raises(ValueError, match="too short"):
        image(torch.zeros(1, 100), VIEW, CHANNEL)


def test_activity_follows_20_ms_frames():
    active = np.zeros(50, dtype=bool)
    active[10:20] = True
    mask = activity(active, VIEW, 126)
    assert mask[26:49].all() and not mask[:24].any() and not mask[51:].any()
