"""Videos of samples: formats, places in a prompt, and batches of the families that take video."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, picture
from teacher_processors import HAS_SMOLVLM_PROCESSOR, HAS_TORCHVISION, TILE
from test_teacher_batches import masked_texts

from mmmamba_cli.data import SampleEncoder, open_corpus, parse_sample
from mmmamba_cli.data.sample import Video
from mmmamba_cli.data.teacher_collator import TeacherCollator
from mmmamba_cli.data.video import load_frames
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import HolisticVLMProcessor, TeacherProcessor
from mmmamba_cli.processing.prompt_turns import Slot, place_slots

WITH_VIDEO = [name for name, family in FAMILIES.items() if family.video]
FRAMES = 4


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.message


def asked(question: Any, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": "It moves."}]
    return {"messages": said, **more}


def test_a_sample_names_frames_or_clips() -> None:
    paths = [f"{n}.png" for n in range(3)]
    frames = tuple(map(Path, paths))
    part = {"type": "video", "video": paths}
    clip = (Video(clip=Path("a.mp4")),)
    for record, expected in (
        (asked("What?", video="a.mp4"), clip),
        (asked("What?", videos=["a.mp4"]), clip),
        (asked("What?", video=["a.mp4", "b.mp4"]), (*clip, Video(clip=Path("b.mp4")))),
        (asked("What?", video=paths), (Video(frames),)),
        (asked("What?", videos=[paths, "a.mp4"], fps=1), (Video(frames, fps=1.0), *clip)),
        (asked([part, {"type": "text", "text": "What?"}]), (Video(frames),)),
    ):
        assert parse_sample(record, "x", Path).videos == expected


def test_places_of_videos_and_pictures() -> None:
    plain = asked("<video>\nWhat is it? <image>")["messages"]
    video, image = Slot.VIDEO, Slot.IMAGE
    assert place_slots(plain, 1, 1)[0].content == (video, "What is it? ", image)
    # Without videos it is a word.
    assert place_slots(plain, 1)[0].content == ("<video>\nWhat is it? ", image)
    bare = asked("What?")["messages"]
    assert place_slots(bare, 1, 2)[0].content == (image, video, video, "What?")
    assert "1 <video> but 2 videos" in refused(lambda: place_slots(plain, 1, 2))
    parts = asked([{"type": "video"}, {"type": "text", "text": "<video>"}])["messages"]
    assert place_slots(parts, 0, 1)[0].content == (video, "<video>")


def test_frames_have_one_size(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths[:2]:
        picture(24, 16).save(path)
    picture(16, 24).save(paths[2])
    found = load_frames(Video(tuple(paths[:2]), fps=4.0), decode_clip=lambda path: 1 / 0)
    assert found.pixels.shape == (2, 16, 24, 3)
    assert (found.metadata.duration, list(found.metadata.frames_indices)) == (0.5, [0, 1])
    with pytest.raises(DataError, match="several sizes: 16 x 24 and 24 x 16"):
        load_frames(Video(tuple(paths)), decode_clip=lambda path: 1 / 0)


def test_models_without_video_refuse_it(processor: HolisticVLMProcessor) -> None:
    sample = parse_sample(asked("What?", video="a.mp4"), "x", Path)
    assert "reads text and images only" in refused(
        lambda: SampleEncoder(processor, 99, None)(sample)
    )
    teacher = TeacherCollator(TeacherProcessor(FAMILIES["gemma3"].processor), 99)
    assert "takes none" in refused(lambda: teacher.encode(sample))


def family_collator(name: str) -> TeacherCollator:
    if not HAS_TORCHVISION:
        pytest.skip("video processors need torchvision")
    if name == "smolvlm" and not HAS_SMOLVLM_PROCESSOR:
        pytest.skip("SmolVLMProcessor needs num2words")
    return TeacherCollator(TeacherProcessor(FAMILIES[name].processor), 2048)


def write_set(folder: Path) -> Path:
    """Two samples of frames, of unequal numbers of turns, and one of text."""
    for number in range(FRAMES):
        picture(TILE, TILE, seed=number).save(folder / f"{number}.png")
    frames = [f"{number}.png" for number in range(FRAMES)]
    first = asked("<video>\nWhat moves?", video=frames)
    more = [{"role": "user", "content": "请描述。"}, {"role": "assistant", "content": "红色。"}]
    second = asked("What moves?", video=frames[::-1], fps=1)
    second["messages"] += more
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, (first, second, asked("Hm?")))), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_batch_with_videos(name: str, tmp_path: Path) -> None:
    make = family_collator(name)
    corpus = open_corpus(write_set(tmp_path))
    encoded = [make.encode(corpus[index]) for index in range(3)]
    batch, bad = make.collate([[each] for each in encoded])
    assert not bad
    assert batch.inputs["attention_mask"].sum(1).tolist() == [len(each) for each in encoded]
    end = "<end_of_utterance>" if name == "smolvlm" else "<|im_end|>"
    answers = masked_texts(FAMILIES[name].tokenizer, batch, 1)
    assert [each.strip() for each in answers] == [f"It moves.{end}", f"红色。{end}"]
    model = FAMILIES[name].model()
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        alone, _ = make.collate([[encoded[1]]])
        expected = model(**alone.inputs).logits[0]
    assert torch.allclose(logits[1, : len(expected)], expected, atol=1e-5, rtol=0)


def test_a_clip_is_decoded_and_sampled_by_the_processor_s_rule(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    make = family_collator("qwen3_vl")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for number in range(32):
            frame = np.full((32, 32, 3), 8 * number, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    lines = [asked("<video>\nWhat?", video=name) for name in ("a.mp4", "bad.mp4")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    corpus = open_corpus(tmp_path / "train.jsonl")
    encoded = make.encode(corpus[0])
    batch, bad = make.collate([[encoded]])
    assert not bad and batch.num_tokens == len(encoded)
    # Four seconds, two frames a second, in pairs.
    assert batch.inputs["video_grid_thw"][0, 0] == 4
    assert "cannot be decoded" in refused(lambda: make.encode(corpus[1]))
