"""Sound as arrays with their rate; files in and out. No torch."""

from __future__ import annotations

import errno
import io
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from core.errors import BadInput, DiskFull, SoundstageError

# What libsndfile reads is read by it, with exact lengths; everything else goes to FFmpeg's libraries.
_SNDFILE_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM")
# Named, because FFmpeg also has playlist formats, by which an upload could open other files of this machine.
_CONTAINERS = "mov,mp4,m4a,3gp,matroska,webm,mp3,aac,ogg,wav,w64,flac,aiff,caf,amr,asf,avi,mpegts"
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".m4a", ".mp4", ".aac", ".ogg", ".opus", ".webm"})
_RATES = (1_000, 768_000)
_SILENCE = 10 ** (-80 / 20)  # a peak under -80 dBFS: what a muted microphone gives
_FORMATS = {
    ".wav": {"format": "WAV", "subtype": "PCM_16"},
    ".flac": {"format": "FLAC", "subtype": "PCM_16"},
    ".mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
}
WRITTEN_SUFFIXES = tuple(_FORMATS)  # what `write_audio` writes
_MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_BLOCK_SECONDS = 0.4  # one gating block of ITU-R BS.1770


@dataclass(frozen=True)
class Audio:
    """A waveform.

    Attributes:
        samples: float32, shape (frames,) for mono or (channels, frames), in [-1, 1].
        rate: sample rate in Hz.
    """

    samples: npt.NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[-1] / self.rate


@dataclass(frozen=True)
class AudioFacts:
    """What a file says of itself, without its samples."""

    seconds: float
    rate: int
    channels: int


def probe_audio(file: Path) -> AudioFacts:
    """Read an audio file's length, rate and channels; `BadInput` if it is none."""
    if _has_sndfile_magic(file):
        _refuse_short_wav(file)
        try:
            with _sound_file(file) as sound:
                return _plausible(
                    file, AudioFacts(sound.frames / sound.samplerate, sound.samplerate, sound.channels)
                )
        except soundfile.LibsndfileError:
            pass  # a codec that libsndfile lacks, in a container that it knows
    with _av_stream(file) as (container, stream):
        # Packets are counted, because headers give no length (a browser's webm) or guess it (mp3).
        ticks = sum(packet.duration or 0 for packet in container.demux(stream))
        return _plausible(file, AudioFacts(float(ticks * stream.time_base), stream.rate, stream.channels))


def read_audio(
    file: Path, *, rate: int | None = None, mono: bool = True, limit_seconds: float | None = None
) -> Audio:
    """Read any common audio file (wav, flac, mp3, m4a, ogg, webm) as float32.

    Samples beyond full scale, which float files may hold, are scaled down together, not clipped.

    Args:
        rate: resample to this many Hz; None keeps the file's.
        mono: mix the channels down.
        limit_seconds: read no more than this from the start.

    Raises:
        BadInput: not audio, empty, truncated, silent all through, or with samples that are not numbers.
    """
    samples, source_rate = _decode(file, limit_seconds)
    if not samples.size:
        raise BadInput(f"{file.name} holds no sound at all; use a recording with sound in it.")
    if not np.isfinite(samples).all():
        raise BadInput(f"{file.name} holds samples that are not numbers; export the recording again.")
    samples = _within_full_scale(samples)
    if mono and samples.ndim == 2:
        samples = samples.mean(axis=0)
    if np.abs(samples).max() < _SILENCE:
        raise BadInput(f"{file.name} is silent all through; use a recording with sound in it.")
    return resample(Audio(samples, source_rate), rate or source_rate)


def write_audio(file: Path, audio: Audio, tags: Mapping[str, str] | None = None) -> None:
    """Write wav (16-bit PCM), flac (16-bit) or mp3, by suffix. A file that could not be finished is removed.

    Args:
        tags: title, artist, comment, copyright, date, software, license ...: the attributes of
            `soundfile.SoundFile`.

    Raises:
        DiskFull: there is no room.
        BadInput: the suffix is none of these.
        SoundstageError: samples that are not numbers, or a place that cannot be written.
    """
    suffix = file.suffix.lower()
    if suffix not in _FORMATS:
        raise BadInput(f"{file.name} should end in {', '.join(_FORMATS)} for sound.")
    if not np.isfinite(audio.samples).all():
        raise SoundstageError("The sound holds samples that are not numbers; nothing was written.")
    if suffix == ".mp3" and audio.rate not in _MP3_RATES:
        audio = resample(audio, next((r for r in _MP3_RATES if r > audio.rate), _MP3_RATES[-1]))
    # Encoded in memory first: libsndfile does not tell whether a disk took its last bytes.
    encoded = io.BytesIO()
    channels = 1 if audio.samples.ndim == 1 else audio.samples.shape[0]
    with soundfile.SoundFile(encoded, "w", audio.rate, channels, **_FORMATS[suffix]) as sound:
        for name, value in (tags or {}).items():
            setattr(sound, name, value)
        sound.write(audio.samples.T)
    write_whole(file, encoded.getvalue())


def convert_audio(source: Path, target: Path) -> None:
    """Write `source` again in the format of `target`'s suffix; raises what reading and writing raise."""
    write_audio(target, Audio(*_decode(source, None)))


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        DiskFull: there is no room.
        SoundstageError: the place cannot be written.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    with room_for(file.name):
        try:
            partial.write_bytes(data)
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Turn the system's errors while writing `what` into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: some library raises OSError for reasons of its own
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                f"There is no room left on the disk for {what}; free some and try again."
            ) from None
        raise SoundstageError(f"{what} cannot be written: {os.strerror(error.errno or 0)}.") from error


def resample(audio: Audio, rate: int) -> Audio:
    """The same sound at another rate, band-limited (soxr's high quality)."""
    if rate == audio.rate or not audio.samples.size:
        return Audio(audio.samples, rate)
    import soxr

    # The filter may ring beyond full scale.
    return Audio(_within_full_scale(soxr.resample(audio.samples.T, audio.rate, rate).T), rate)


def loudness(audio: Audio) -> float | None:
    """Integrated loudness in LUFS after ITU-R BS.1770-4.

    None where the standard gives no number: clips under 0.4 s (one gating block), and sound under -70 LUFS.
    """
    if audio.seconds < _BLOCK_SECONDS:
        return None
    import pyloudnorm

    measured = float(pyloudnorm.Meter(audio.rate).integrated_loudness(audio.samples.T))
    return measured if np.isfinite(measured) else None


def at_loudness(audio: Audio, target: float = -20.0, ceiling: float = -1.0) -> Audio:
    """A copy for listening at `target` LUFS, quieter where its sample peak would pass `ceiling` dBFS.

    Sound without a measurable loudness keeps its level.
    """
    measured = loudness(audio)
    gain = 1.0 if measured is None else 10 ** ((target - measured) / 20)
    peak = float(np.abs(audio.samples).max(initial=0))
    if peak * gain > (limit := 10 ** (ceiling / 20)):
        gain = limit / peak
    return Audio((audio.samples * gain).astype(np.float32), audio.rate)


def peaks(audio: Audio, columns: int) -> list[list[float]]:
    """Lowest and highest sample of each of `columns` equal stretches, over all channels, for drawing.

    Returns:
        (columns, 2) as plain lists, which JSON takes, to three decimals.
    """
    channels = np.atleast_2d(audio.samples)
    frames = channels.shape[1]
    if not frames:
        return [[0.0, 0.0]] * columns
    starts = np.arange(columns) * frames // columns
    low = np.minimum.reduceat(channels.min(axis=0), starts)
    high = np.maximum.reduceat(channels.max(axis=0), starts)
    drawn: list[list[float]] = np.stack([low, high], axis=1).astype(float).round(3).tolist()
    return drawn


def _decode(file: Path, limit_seconds: float | None) -> tuple[npt.NDArray[np.float32], int]:
    """Samples, (frames,) or (channels, frames), and their rate."""
    if _has_sndfile_magic(file):
        _refuse_short_wav(file)
        try:
            with _sound_file(file) as sound:
                _plausible(file, AudioFacts(0, sound.samplerate, sound.channels))
                wanted = min(sound.frames, _frames(limit_seconds, sound.samplerate))
                try:
                    samples = sound.read(wanted, dtype="float32")
                except soundfile.LibsndfileError:
                    raise _cut_short(file) from None
                return np.ascontiguousarray(samples.T), sound.samplerate
        except soundfile.LibsndfileError:
            pass  # as in probe_audio
    return _decode_av(file, limit_seconds)


def _decode_av(file: Path, limit_seconds: float | None) -> tuple[npt.NDArray[np.float32], int]:
    import av

    with _av_stream(file) as (container, stream):
        rate = _plausible(file, AudioFacts(0, stream.rate, stream.channels)).rate
        planar = av.AudioResampler("fltp", stream.layout, rate)
        pieces: list[npt.NDArray[np.float32]] = []
        frames, wanted = 0, _frames(limit_seconds, rate)
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                continue  # players skip damaged packets, and so do we; tags at an mp3's end look like one
            for frame in decoded:
                for piece in planar.resample(frame):
                    pieces.append(piece.to_ndarray())
                    frames += piece.samples
            if frames >= wanted:
                break
        else:
            # An mp4's index promises a length. Half a second covers what encoders add and take away.
            promised = float(stream.duration * stream.time_base) if stream.duration else 0.0
            if container.format.name != "mp3" and frames / rate < 0.95 * promised - 0.5:
                raise _cut_short(file)
    samples = np.concatenate(pieces, axis=1)[:, :wanted] if pieces else np.zeros((1, 0), np.float32)
    return (samples[0] if len(samples) == 1 else samples), rate


def _frames(seconds: float | None, rate: int) -> int:
    return 2**62 if seconds is None else round(seconds * rate)


def _has_sndfile_magic(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise BadInput(f"{file.name} cannot be read: {os.strerror(error.errno or 0)}.") from None
    if not head:
        raise BadInput(f"{file.name} is empty (0 bytes); use a recording with sound in it.")
    return head in _SNDFILE_MAGIC


@contextmanager
def _sound_file(file: Path) -> Iterator[Any]:
    # By descriptor, so that libsndfile goes by what is in the file and not by its suffix.
    with file.open("rb") as stream, soundfile.SoundFile(stream.fileno(), closefd=False) as sound:
        yield sound


@contextmanager
def _av_stream(file: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first audio stream."""
    import av

    try:
        with (
            file.open("rb") as stream,
            av.open(stream, options={"format_whitelist": _CONTAINERS}) as container,
        ):
            if not container.streams.audio:
                raise BadInput(f"{file.name} has no sound track; use a recording with sound in it.")
            yield container, container.streams.audio[0]
    except (av.error.FFmpegError, ValueError):
        raise BadInput(
            f"{file.name} is not an audio file that can be read; use wav, flac, mp3, m4a, ogg or webm."
        ) from None


def _refuse_short_wav(file: Path) -> None:
    """Check a wav's chunk lengths: libsndfile reads a cut one without a word."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        riff, _, form = struct.unpack("<4sI4s", stream.read(12).ljust(12, b"\0"))
        if (riff, form) != (b"RIFF", b"WAVE"):
            return
        while len(header := stream.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            # Programs that write to a pipe cannot know the length and put the largest number there.
            if stream.tell() + length > size and length < 0x7FFF_0000:
                raise _cut_short(file)
            if name == b"data":
                return
            stream.seek(length + length % 2, io.SEEK_CUR)
    raise _cut_short(file)


def _cut_short(file: Path) -> BadInput:
    return BadInput(f"{file.name} is cut short: it holds less sound than its header promises; copy it again.")


def _plausible(file: Path, facts: AudioFacts) -> AudioFacts:
    if not _RATES[0] <= facts.rate <= _RATES[1]:
        raise BadInput(
            f"{file.name} gives a sample rate of {facts.rate:,} Hz; "
            f"between {_RATES[0]:,} and {_RATES[1]:,} Hz would be right."
        )
    return facts


def _within_full_scale(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    peak = float(np.abs(samples).max(initial=0))
    return (samples / peak).astype(np.float32) if peak > 1 else samples
