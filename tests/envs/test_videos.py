"""Videos in rows: what is chosen of them, the forms that they have, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.video import FrameRule, Video
from vlmenv.envs.temporal import TemporalEnv
from vlmenv.envs.video_qa import VideoQAEnv
from vlmenv.envs.vqa import VQAEnv

COLOURS = ("red", "lime", "blue", "yellow", "white", "black")


def pictures(count: int = 6, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[i % len(COLOURS)]) for i in range(count)]


def gif(count: int = 6, milliseconds: int | list[int] = 500) -> bytes:
    first, *rest = pictures(count)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds)
    return buffer.getvalue()


def mp4(file: Path, count: int = 30, rate: int = 10, size: tuple[int, int] = (64, 48), **options: Any) -> Path:
    """Frames whose grey value is four times their number."""
    av = pytest.importorskip("av")
    with av.open(str(file), "w", **options) as container:
        stream = container.add_stream("mpeg4" if file.suffix != ".webm" else "libvpx", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            frame = np.full((size[1], size[0], 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


def colours(video: Video) -> list[tuple[int, ...]]:
    return [tuple(frame[frame.shape[0] // 2, frame.shape[1] // 2].tolist()) for frame in video.frames]


def loaded(row: dict[str, Any], folder: Path | None = None, **arguments: Any) -> Video:
    given = {"question": "?", "answer": "yes"} | row
    (video,) = VideoQAEnv(dataset=[given], image_root=folder, **arguments).source.get(0).videos
    return video


@pytest.mark.parametrize(
    ("rule", "total", "duration", "chosen"),
    [
        (FrameRule(), 300, 10.0, np.linspace(0, 299, 20).round()),  # 2 per second
        (FrameRule(), 9000, 300.0, np.linspace(0, 8999, 64).round()),  # at most 64
        (FrameRule(), 30, 1.0, [0, 10, 19, 29]),  # at least 4
        (FrameRule(), 3, 1.0, [0, 1, 2]),  # no more than there are
        (FrameRule(most=1), 30, 1.0, [0]),
        (FrameRule(fps=0.5, most=8), 250, 10.0, np.linspace(0, 249, 5).round()),
    ],
)
def test_frames_by_the_rule(rule: FrameRule, total: int, duration: float, chosen: Any) -> None:
    assert rule.choose(total, duration).tolist() == list(chosen)


def test_frames_are_scaled_down_to_the_most_pixels() -> None:
    assert FrameRule().size(1920, 1080) == (422, 237)
    assert FrameRule().size(64, 48) == (64, 48)
    assert FrameRule(pixels=784).size(100_000, 1) == (8854, 1)


@pytest.mark.parametrize("given", [{"video_fps": 0.0}, {"video_frames": 0}, {"video_pixels": 10}])
def test_numbers_of_the_rule_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))} must be "):
        VideoQAEnv(**given)
    with pytest.raises(ConfigError, match="VQAEnv takes no videos: leave"):
        VQAEnv(**given)


def test_animated_images(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(gif(6, [500, 500, 1000, 250, 250, 500]))
    for row in (
        {"video": "a.gif"},
        {"videos": ["a.gif"]},
        {"video": {"bytes": gif(6, [500, 500, 1000, 250, 250, 500])}},
    ):
        video = loaded(row, tmp_path)
        assert video.duration == pytest.approx(3.0)
        assert video.seconds.tolist() == pytest.approx([0, 0.5, 1.0, 2.0, 2.25, 2.5])
        assert colours(video)[:3] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    fewer = loaded({"video": "a.gif"}, tmp_path, video_frames=2, video_pixels=800)
    assert (fewer.seconds.tolist(), fewer.frames.shape) == ([0, 2.5], (2, 24, 32, 3))
    assert colours(fewer) == [(255, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("as_list", [False, True])
def test_folders_and_lists_of_frames(tmp_path: Path, as_list: bool) -> None:
    (tmp_path / "clip").mkdir()
    names = [f"clip/{number:03}.png" for number in range(6)]
    for name, picture in zip(names, pictures(), strict=True):
        picture.save(tmp_path / name)
    (tmp_path / "clip" / "notes.txt").write_text("none")
    row = {"video": names if as_list else "clip"}
    video = loaded(row | {"fps": 4}, tmp_path, video_fps=4.0)
    assert (video.duration, video.seconds.tolist()) == (1.5, [0, 0.25, 0.5, 0.75, 1.0, 1.25])
    assert colours(video)[1:3] == [(0, 255, 0), (0, 0, 255)]
    with pytest.raises(DataError, match=r"row 0: the row has a video as frames: state .* column 'fps'"):
        loaded(row, tmp_path)
    with pytest.raises(DataError, match="'fps' is -1"):
        loaded(row | {"fps": -1}, tmp_path)
    Image.new("RGB", (10, 10)).save(tmp_path / names[5])
    with pytest.raises(DataError, match=r"row 0.*: .* cannot be read as a video: frame 6 has \(10, 10\) pixels"):
        loaded(row | {"fps": 4}, tmp_path)


def test_files_are_decoded_at_chosen_times_and_sizes(tmp_path: Path) -> None:
    video = loaded({"video": str(mp4(tmp_path / "a.mp4"))}, video_pixels=800)
    assert video.duration == pytest.approx(3.0)
    assert video.frames.shape == (6, 24, 32, 3)
    numbers = np.linspace(0, 29, 6).round()
    np.testing.assert_allclose(video.seconds, numbers / 10, atol=1e-6)
    np.testing.assert_allclose([value[0] for value in colours(video)], 4 * numbers, atol=3)
    again = loaded({"video": {"bytes": (tmp_path / "a.mp4").read_bytes(), "path": None}}, video_pixels=800)
    assert again == video


def test_outlines_have_sizes_and_times_without_pixels(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": "yes", "video": str(mp4(tmp_path / "a.mp4"))}]
    source = VideoQAEnv(dataset=rows).source
    (outlined,), (video,) = source.outline(0).videos, source.get(0).videos
    assert outlined.frames.shape == video.frames.shape
    assert outlined.seconds.tolist() == video.seconds.tolist()
    assert not outlined.frames.any()
    assert outlined.frames.strides[:3] == (0, 0, 0)  # no memory


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.mp4", b"", "cannot be read as a video"),
        ("a.mp4", b"no video" * 100, "cannot be read as a video"),
        ("a.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "cannot be read as a video"),
        ("a.mp4", b"ffconcat version 1.0\nfile 'b.mp4'\n", "cannot be read as a video"),
        ("a.gif", b"GIF89a", "cannot be read as a video"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    pytest.importorskip("av")
    (tmp_path / name).write_bytes(content)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?", "answer": "yes", "video": name}))
    with pytest.raises(DataError, match=rf"rows\.jsonl:1 \(id 0\): .*{name} {told}"):
        VideoQAEnv(dataset=tmp_path / "rows.jsonl").source.get(0)


def test_cut_off_files_are_named(tmp_path: Path) -> None:
    """An mp4 with its index in front, as for streams, half of whose pictures are missing."""
    file = mp4(tmp_path / "a.mp4", 60, size=(320, 240), options={"movflags": "faststart"})
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=r"a\.mp4 cannot be read as a video"):
        loaded({"video": str(file)})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"video": "b.gif"}, "there is no video .*b.gif"),
        ({"video": "https://x.org/a.mp4"}, "is no file: download it first"),
        ({"video": 5}, "a video is neither a path"),
        ({"video": [[]]}, "a video is neither a path"),
        ({}, "the task needs a video, but the row has none"),
        ({"video": "a.gif", "question": "<video> or <video>?"}, "2 <video> marks for 1 videos"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    (tmp_path / "a.gif").write_bytes(gif())
    with pytest.raises(DataError, match=f"row 0: .*{told}"):
        loaded(row, tmp_path)


def test_an_absent_pyav_is_told_before_anything_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r'pip install "vlmenv\[video\]"'):
        loaded({"video": "a.mp4"}, tmp_path)
    (tmp_path / "a.gif").write_bytes(gif())
    assert len(loaded({"video": "a.gif"}, tmp_path).frames) == 6


def test_places_of_videos_and_images(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(gif())
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "Is it in "},
        {"type": "video", "video": "a.gif"},
        {"type": "text", "text": "?"},
    ]
    rows = [
        {"messages": [{"role": "user", "content": parts}], "answer": "no"},
        {"question": "<video>Is it red?", "video": "a.gif", "answer": "no"},
    ]
    env = VideoQAEnv(dataset=rows, image_root=tmp_path, prompt_template="{question}")
    first, second = env.observe(env.source.get(0)), env.observe(env.source.get(1))
    assert (first["prompt"], len(first["images"]), len(first["videos"])) == ("Is it in <video>?", 1, 1)
    assert (second["prompt"], len(second["images"]), len(second["videos"])) == ("Is it red?", 0, 1)


def test_files_outside_the_folder_are_refused_on_request(tmp_path: Path) -> None:
    (tmp_path / "in" / "clip").mkdir(parents=True)
    (tmp_path / "a.gif").write_bytes(gif())
    pictures(1)[0].save(tmp_path / "0.png")
    (tmp_path / "in" / "clip" / "0.png").symlink_to(tmp_path / "0.png")
    for row in ({"video": "../a.gif"}, {"video": "clip", "fps": 1}):
        with pytest.raises(DataError, match=r"lies outside"):
            loaded(row, tmp_path / "in", confine_images=True)
        loaded(row, tmp_path / "in")


@pytest.mark.parametrize("row", [{"video": "a.gif"}, {"video": "clip", "fps": 1}, {"video": ["clip/0.png"], "fps": 1}])
def test_the_folder_may_be_relative(tmp_path: Path, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "clip").mkdir(parents=True)
    (tmp_path / "in" / "a.gif").write_bytes(gif())
    pictures(1)[0].save(tmp_path / "in" / "clip" / "0.png")
    monkeypatch.chdir(tmp_path)
    for confined in (False, True):
        assert colours(loaded(row, Path("in"), confine_images=confined))[0] == (255, 0, 0)


def test_the_rule_holds_for_built_in_clips() -> None:
    few = TemporalEnv(video_fps=0.5, video_frames=3, video_pixels=2500).source.get(1).videos[0]
    many = TemporalEnv(video_fps=10).source.get(1).videos[0]
    assert few.frames.shape == (3, 50, 50, 3)
    assert few.duration == many.duration
    assert len(many.frames) == min(64, 10 * many.duration)
