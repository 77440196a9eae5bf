"""Sound files in and out, with every kind of bad one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from core.errors import BadInput, SoundstageError
from core.media import (
    Audio,
    at_loudness,
    convert_audio,
    loudness,
    peaks,
    probe_audio,
    read_audio,
    write_audio,
)


def tone(seconds: float = 1.0, rate: int = 24000, frequency: float = 440.0, level: float = 0.3) -> Audio:
    time = np.arange(round(seconds * rate)) / rate
    return Audio((level * np.sin(2 * np.pi * frequency * time)).astype(np.float32), rate)


def pitch(audio: Audio) -> float:
    """The strongest frequency, Hz."""
    return float(np.abs(np.fft.rfft(audio.samples)).argmax() * audio.rate / len(audio.samples))


def encode(file: Path, audio: Audio, codec: str) -> Path:
    """Write through FFmpeg's libraries: the formats that we read but do not write."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=audio.rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(audio.samples[None], format="fltp", layout="mono")
        frame.rate = audio.rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
@pytest.mark.parametrize("rate", [16000, 22050, 48000])
def test_what_was_written_is_read_back(tmp_path: Path, suffix: str, rate: int) -> None:
    file = tmp_path / f"a{suffix}"
    audio = tone(2, rate)
    write_audio(file, audio, {"title": "Tön", "comment": "AI-generated"})
    back = read_audio(file)
    assert back.rate == rate
    assert back.samples.dtype == np.float32
    assert back.seconds == pytest.approx(2, abs=0.1)
    assert pitch(back) == pytest.approx(440, abs=1)
    assert np.abs(back.samples).max() == pytest.approx(0.3, abs=0.03)
    assert probe_audio(file).seconds == pytest.approx(back.seconds, abs=0.1)  # mp3 pads
    assert soundfile.SoundFile(file).title == "Tön"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_wav_keeps_every_16_bit_value(tmp_path: Path) -> None:
    values = np.arange(-32768, 32768, dtype=np.int32)
    audio = Audio((values / 32768).astype(np.float32), 24000)
    write_audio(tmp_path / "a.wav", audio)
    kept, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.abs(kept.astype(np.int32) - values).max() <= 1
    write_audio(tmp_path / "b.wav", audio)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_mp3_takes_a_rate_that_mp3_does_not_have(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.mp3", tone(1, 96000))
    assert probe_audio(tmp_path / "a.mp3").rate == 48000


@pytest.mark.parametrize(
    ("name", "codec"), [("a.m4a", "aac"), ("a.webm", "libopus"), ("a.ogg", "libopus"), ("a.mka", "aac")]
)
def test_formats_of_phones_and_browsers_are_read(tmp_path: Path, name: str, codec: str) -> None:
    file = encode(tmp_path / name, tone(3, 48000), codec)
    back = read_audio(file, rate=16000)
    assert back.rate == 16000
    assert back.seconds == pytest.approx(3, abs=0.1)
    assert pitch(back) == pytest.approx(440, abs=1)
    facts = probe_audio(file)
    assert (facts.rate, facts.channels) == (48000, 1)
    assert facts.seconds == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "MS_ADPCM"])
def test_every_common_sample_format_of_wav_is_read(tmp_path: Path, subtype: str) -> None:
    audio = tone(1, 96000)
    soundfile.write(tmp_path / "a.wav", audio.samples, audio.rate, subtype)
    back = read_audio(tmp_path / "a.wav", rate=24000)
    assert back.seconds == pytest.approx(1, abs=0.03)
    assert np.abs(back.samples).max() == pytest.approx(0.3, abs=0.02)
    assert pitch(back) == pytest.approx(440, abs=1)


def test_stereo_is_mixed_down_or_kept(tmp_path: Path) -> None:
    left, right = tone().samples, np.zeros(24000, np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 24000, "FLOAT")
    assert np.allclose(read_audio(tmp_path / "a.wav").samples, left / 2, atol=1e-6)
    both = read_audio(tmp_path / "a.wav", mono=False)
    assert both.samples.shape == (2, 24000)
    assert both.seconds == 1
    write_audio(tmp_path / "b.wav", both)
    assert probe_audio(tmp_path / "b.wav").channels == 2


def test_a_tenth_of_a_second_is_read(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", tone(0.1))
    assert read_audio(tmp_path / "a.wav", rate=16000).seconds == pytest.approx(0.1, abs=1e-3)


def test_a_limit_reads_only_the_start(tmp_path: Path) -> None:
    m4a = encode(tmp_path / "a.m4a", tone(20, 16000), "aac")
    assert read_audio(m4a, limit_seconds=1.5).seconds == 1.5
    flac = tmp_path / "a.flac"
    write_audio(flac, tone(20, 16000))
    data = flac.read_bytes()
    flac.write_bytes(data[: len(data) // 2])
    assert read_audio(flac, limit_seconds=1.5).seconds == 1.5, "what is not read is not missed"
    with pytest.raises(BadInput, match="cut short"):
        read_audio(flac)


def test_samples_beyond_full_scale_are_scaled_down(tmp_path: Path) -> None:
    loud = tone(level=4.0)
    soundfile.write(tmp_path / "a.wav", loud.samples, loud.rate, "FLOAT")
    assert np.allclose(read_audio(tmp_path / "a.wav").samples, loud.samples / np.abs(loud.samples).max())


def test_resampling_does_not_pass_full_scale(tmp_path: Path) -> None:
    square = np.sign(tone(level=1.0).samples)
    soundfile.write(tmp_path / "a.wav", square, 24000, "FLOAT")
    assert np.abs(read_audio(tmp_path / "a.wav", rate=44100).samples).max() <= 1


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _no_samples(file: Path) -> None:
    soundfile.write(file, np.zeros(0, np.float32), 24000)


def _silent(file: Path) -> None:
    soundfile.write(file, np.zeros(24000, np.float32), 24000)


def _text(file: Path) -> None:
    file.write_text("Not a recording, only renamed.\n" * 200)


def _noise(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(20000))


def _playlist(file: Path) -> None:
    """By which FFmpeg would open another file of the folder."""
    write_audio(file.with_name("private.mp3"), tone())
    file.write_text("ffconcat version 1.0\nfile private.mp3\n")


def _cut(file: Path) -> None:
    write_audio(file, tone())
    file.write_bytes(file.read_bytes()[:20000])


def _header_only(file: Path) -> None:
    write_audio(file, tone())
    file.write_bytes(file.read_bytes()[:30])


def _not_numbers(file: Path) -> None:
    samples = tone().samples.copy()
    samples[100] = np.nan
    soundfile.write(file, samples, 24000, "FLOAT")


def _infinite(file: Path) -> None:
    samples = tone().samples.copy()
    samples[100] = np.inf
    soundfile.write(file, samples, 24000, "FLOAT")


def _odd_rate(file: Path) -> None:
    soundfile.write(file, tone().samples, 2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_empty, "voice.wav is empty"),
        (_no_samples, "voice.wav holds no sound at all"),
        (_silent, "voice.wav is silent all through"),
        (_text, "voice.wav is not an audio file"),
        (_noise, "voice.wav is not an audio file"),
        (_playlist, "voice.wav is not an audio file"),
        (_cut, "voice.wav is cut short"),
        (_header_only, "voice.wav is cut short"),
        (_not_numbers, "voice.wav holds samples that are not numbers"),
        (_infinite, "voice.wav holds samples that are not numbers"),
        (_odd_rate, "voice.wav gives a sample rate of 2 Hz"),
        (lambda file: None, "voice.wav cannot be read: No such file"),
    ],
)
def test_bad_recordings_are_refused_in_one_sentence(tmp_path: Path, make: object, sentence: str) -> None:
    file = tmp_path / "voice.wav"
    make(file)  # type: ignore[operator]
    with pytest.raises(BadInput, match=sentence) as refusal:
        read_audio(file, rate=16000)
    assert "\n" not in str(refusal.value)
    if make in (_empty, _text, _noise, _playlist, _cut, _header_only, _odd_rate):
        with pytest.raises(BadInput, match=sentence):
            probe_audio(file)


def test_a_wav_of_unknown_length_is_read(tmp_path: Path) -> None:
    """As a program writes it into a pipe."""
    file = tmp_path / "a.wav"
    write_audio(file, tone())
    data = bytearray(file.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    assert read_audio(file).seconds == 1


def test_a_cut_m4a_is_refused(tmp_path: Path) -> None:
    # With the index at the front, as a download has it, the file opens and ends early.
    file = tmp_path / "a.mp4"
    audio = tone(20, 16000)
    with av.open(str(file), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("aac", rate=audio.rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(audio.samples[None], format="fltp", layout="mono")
        frame.rate = audio.rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    data = file.read_bytes()
    assert read_audio(file).seconds == pytest.approx(20, abs=0.1)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="cut short"):
        read_audio(file)


def test_a_film_without_sound_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BadInput, match="no sound track"):
        read_audio(file)


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"\.wav, \.flac, \.mp3"):
        write_audio(tmp_path / "a.txt", tone())


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(SoundstageError, match="not numbers"):
        write_audio(tmp_path / "a.wav", Audio(np.full(10, np.nan, np.float32), 24000))
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SoundstageError, match=r"a\.wav cannot be written: No such file"):
        write_audio(tmp_path / "gone" / "a.wav", tone())


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from core.errors import DiskFull
from core.media import Audio, write_audio
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    write_audio(Path(sys.argv[1]), Audio(np.full(24000, 0.5, np.float32), 24000))
except DiskFull as error:
    print(error)
"""


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    """The system's own limit on a file's size stops the write half-way, as a full disk does."""
    file = tmp_path / "a.wav"
    told = subprocess.run([sys.executable, "-c", FULL, file], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("There is no room left on the disk for a.wav")
    assert not list(tmp_path.iterdir())


def test_loudness_is_that_of_the_standard() -> None:
    # EBU Tech 3341, case 1 and 2: a stereo 1 kHz tone at -23 and -33 dBFS has -23 and -33 LUFS.
    for level in (-23.0, -33.0):
        one = tone(20, 48000, 1000, 10 ** (level / 20)).samples
        assert loudness(Audio(np.stack([one, one]), 48000)) == pytest.approx(level, abs=0.1)


def test_loudness_has_no_number_for_silence_and_for_clips_under_a_block() -> None:
    assert loudness(Audio(np.zeros(24000, np.float32), 24000)) is None
    assert loudness(tone(0.39)) is None
    assert loudness(tone(0.4)) is not None


def test_listening_copies_are_equally_loud() -> None:
    for level in (0.01, 0.3, 0.9):
        assert loudness(at_loudness(tone(3, level=level))) == pytest.approx(-20, abs=0.1)


def test_a_listening_copy_keeps_below_the_ceiling() -> None:
    clicks = np.zeros(48000, np.float32)
    clicks[::4800] = 0.5
    copy = at_loudness(Audio(clicks, 24000), target=-10)
    assert np.abs(copy.samples).max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    short = at_loudness(tone(0.1, level=1.0))
    assert np.abs(short.samples).max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)


def test_peaks_hold_the_lowest_and_highest_of_each_stretch() -> None:
    samples = np.zeros(1000, np.float32)
    samples[5], samples[995] = 0.75, -0.5
    drawn = peaks(Audio(samples, 1000), 10)
    assert drawn == [[0, 0.75], *[[0, 0]] * 8, [-0.5, 0]]
    assert peaks(Audio(np.stack([samples, -samples]), 1000), 10)[0] == [-0.75, 0.75]
    assert len(peaks(Audio(samples[:3], 1000), 10)) == 10
    assert peaks(Audio(samples[:0], 1000), 10) == [[0, 0]] * 10


def test_a_file_is_converted_by_suffix(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", tone())
    convert_audio(tmp_path / "a.wav", tmp_path / "a.flac")
    assert np.array_equal(read_audio(tmp_path / "a.flac").samples, read_audio(tmp_path / "a.wav").samples)
