"""Pictures that are there already: paired by their names, scored the same however often interrupted, or refused."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from teefusion import pictures, ready_pictures, scoring
from teefusion.errors import ScorerError, SettingsError, TeEFusionError, UsageError
from teefusion.pictures import read_picture
from teefusion.prompts import Prompt
from teefusion.ready_pictures import pair, score_pictures, table
from teefusion.settings import Settings, load_settings


def draw(file: Path, seed: int, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Eighty prompts in each of two styles, as HPS's lists have them, and their pictures."""
    for style in ("anime", "photo"):
        for k in range(80):
            draw(tmp_path / "images" / style / f"{k:05d}.jpg", k + (1000 if style == "photo" else 0))
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = [
        {"prompt": f"a {letters[k % 26]} {letters[k // 26]} {style}", "style": style}
        for style in ("photo", "anime")
        for k in range(80)
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return tmp_path / "images"


@pytest.fixture
def chosen(layout: Path, tiny_scorer: Path) -> Settings:
    return load_settings(
        overrides={
            "workdir": layout.parent / "work",
            "device": "cpu",
            "prompts.source": str(layout.parent / "prompts.json"),
            "evaluate.scorer": str(tiny_scorer),
            "evaluate.batch_size": 16,
        }
    )


def test_each_picture_is_scored_with_the_prompt_of_its_place_in_its_style(layout: Path, chosen: Settings) -> None:
    result = score_pictures(chosen, layout)
    per_picture = {entry["file"]: entry for entry in json.loads(Path(result["output"]).read_text())["per_picture"]}
    assert len(per_picture) == 160
    assert per_picture["photo/00027.jpg"]["prompt"] == "a b b photo"
    scorer = scoring.load_scorer(chosen.evaluate.scorer, device="cpu")
    with Image.open(layout / "photo" / "00027.jpg") as image:
        assert per_picture["photo/00027.jpg"]["score"] == pytest.approx(
            scorer.score([image], ["a b b photo"])[0], abs=1e-3
        )
    of_anime = [entry["score"] for name, entry in per_picture.items() if name.startswith("anime")]
    assert result["benchmark"]["styles"]["anime"]["mean"] == pytest.approx(sum(of_anime) / 80)
    assert result["scores"]["overall"]["n"] == 160
    assert "average" in table(result)


def test_interrupted_and_resumed_it_scores_what_was_left_and_ends_the_same(
    layout: Path, chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, stopped = read_picture, []

    def interrupted(path: Path, **options: Any) -> Image.Image:
        if path.name == "00040.jpg":
            raise KeyboardInterrupt
        return read(path, **options)

    monkeypatch.setattr("teefusion.ready_pictures.read_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_pictures(chosen, layout)

    def counted(path: Path, **options: Any) -> Image.Image:
        stopped.append(path)
        return read(path, **options)

    monkeypatch.setattr("teefusion.ready_pictures.read_picture", counted)
    resumed = score_pictures(chosen, layout)
    assert len(stopped) == 160 - 32  # of anime, two batches of 16 were there
    whole = score_pictures(chosen.model_copy(update={"workdir": layout.parent / "other"}), layout)
    assert {**resumed, "output": ""} == {**whole, "output": ""}


def test_a_mended_picture_costs_its_batch(layout: Path, chosen: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = score_pictures(chosen, layout), []
    draw(layout / "anime" / "00003.jpg", 77)
    monkeypatch.setattr(
        "teefusion.ready_pictures.read_picture", lambda path, **options: read.append(path) or read_picture(path)
    )
    after = score_pictures(chosen, layout)
    assert len(read) == 16
    assert after["scores"]["photo"] == before["scores"]["photo"]
    assert after["scores"]["anime"] != before["scores"]["anime"]


def test_of_a_batch_no_more_than_two_pictures_are_in_memory(
    layout: Path, chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Image.Image]] = []

    def watched(path: Path, **options: Any) -> Image.Image:
        assert sum(picture() is not None for picture in seen) < 2
        seen.append(weakref.ref(picture := read_picture(path, **options)))
        return picture

    monkeypatch.setattr("teefusion.ready_pictures.read_picture", watched)
    score_pictures(chosen, layout)
    assert len(seen) == 160


def test_one_picture_that_comes_twice_counts_twice(tmp_path: Path, chosen: Settings) -> None:
    for k in range(3):
        draw(tmp_path / "twice" / "photo" / f"{k}.png", seed=k % 2)
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a star", "style": "photo"}] * 3))
    single = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"batch_size": 1})})
    result = score_pictures(single, tmp_path / "twice")
    scores = [entry["score"] for entry in json.loads(Path(result["output"]).read_text())["per_picture"]]
    assert scores[0] == scores[2] != scores[1]
    assert result["scores"]["overall"]["n"] == 3


@pytest.mark.slow
def test_two_ranks_under_torchrun_share_the_batches_and_score_what_one_does(
    layout: Path, chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = score_pictures(chosen.model_copy(update={"workdir": layout.parent / "alone"}), layout)
    two = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"num_processes": 2})})
    monkeypatch.setattr("teefusion.ready_pictures.read_picture", None)  # here nothing is left to read
    assert {**score_pictures(two, layout), "output": ""} == {**alone, "output": ""}


def test_a_picture_that_a_rank_cannot_read_ends_all(
    layout: Path, chosen: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def torchrun(settings: Settings, processes: int, module: str, arguments: list[str]) -> int:
        file = layout.parent / "settings.json"
        file.write_text(settings.to_json())
        monkeypatch.setattr("sys.argv", [module, f"--settings={file}", *arguments])
        with pytest.raises(SystemExit) as ended:
            ready_pictures.main()
        return int(ended.value.code or 0)

    monkeypatch.setattr("teefusion.launch._torchrun", torchrun)
    (layout / "anime" / "00017.jpg").write_bytes(b"")
    two = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"num_processes": 2})})
    with pytest.raises(TeEFusionError, match=r"ended with exit code 1; the reason is above"):
        score_pictures(two, layout)
    assert "00017.jpg is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "photo" / "00079.jpg").unlink(),
            "79 pictures for 80 prompts: 1 missing, the first",
        ),
        (lambda folder: draw(folder / "photo" / "00080.jpg", 1), "00080.jpg is no picture of one of 80 prompts"),
        (lambda folder: draw(folder / "photo" / "00003.png", 1), "00003.png is no picture of one of 80 prompts"),
        (lambda folder: (folder / "photo" / "notes.txt").write_text(""), "notes.txt is no picture of one of 80"),
        (lambda folder: draw(folder / "sketch" / "00000.jpg", 1), "holds 'sketch', which is no style of the prompts"),
    ],
)
def test_pictures_that_do_not_fit_the_prompts_are_refused_before_anything_is_scored(
    layout: Path, chosen: Settings, change: Any, message: str
) -> None:
    change(layout)
    with pytest.raises(UsageError, match=message):
        score_pictures(chosen, layout)
    assert not (layout.parent / "work").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is no folder"):
        pair(tmp_path / "nowhere", [Prompt("a")])


def test_the_bundled_arbiter_scores_nobody_elses_prompts(layout: Path, chosen: Settings) -> None:
    toy = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"scorer": "bundled:shapes"})})
    with pytest.raises(SettingsError, match="can only judge the bundled prompts. Name a real scorer"):
        score_pictures(toy, layout)


# Files


def test_grey_and_transparent_pictures_are_read_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 51).save(tmp_path / "grey.png")
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "grey.png").getpixel((0, 0)) == (51, 51, 51)
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (204, 204, 204)  # a fifth of black over white
    with pytest.raises(ScorerError, match=r"clear\.png: .*partly transparent"):
        read_picture(tmp_path / "clear.png", transparency="refuse")


@pytest.mark.parametrize("kept", [0, 100, 300])
def test_a_truncated_picture_is_an_error_that_names_it(tmp_path: Path, kept: int) -> None:
    draw(tmp_path / "a.png", 0)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:kept])
    with pytest.raises(ScorerError, match=r"a\.png (is empty|cannot be read as a picture)"):
        read_picture(tmp_path / "a.png")


def test_an_animated_picture_is_an_error_not_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ScorerError, match=r"a\.webp is animated: it has 3 frames"):
        read_picture(tmp_path / "a.webp")


def test_a_picture_of_20000_pixels_is_read_along_one_side_and_refused_along_both(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10)).save(tmp_path / "long.png")
    assert read_picture(tmp_path / "long.png").size == (20_000, 10)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(ScorerError, match=r"huge\.png has .* pixels, at most 100,000,000 are read"):
        read_picture(tmp_path / "huge.png")
    Image.new("1", (12_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(ScorerError, match=r"large\.png has 12000x10000 pixels"):
        read_picture(tmp_path / "large.png")


def test_a_deep_picture_is_an_error_that_names_it(tmp_path: Path) -> None:
    Image.new("I;16", (2, 2)).save(tmp_path / "deep.png")
    with pytest.raises(ScorerError, match=r"deep\.png: A picture of mode 'I;16'"):
        read_picture(tmp_path / "deep.png")
    assert pictures.LARGEST_PIXELS == 100_000_000
