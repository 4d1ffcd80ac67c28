import numpy as np
import pytest

from teefusion.shapes.drawings import COLORS, SHAPES, SIZE, STYLES, Scene, all_scenes, draw, near_misses

SCENE = Scene(shape="star", color="orange", background="blue", style="anime")


@pytest.mark.parametrize("style", STYLES)
def test_drawings_are_determined_by_scene_and_generator(style: str) -> None:
    scene = Scene("heart", "red", "white", style)
    first, again, other = (draw(scene, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first.size == (SIZE, SIZE)
    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_background_show_their_colors(shape: str, style: str) -> None:
    scene = Scene(shape, "red", "blue", style)
    pixels = np.asarray(draw(scene, np.random.default_rng(3)), np.int32).reshape(-1, 3)
    red, _, blue = pixels.T
    assert 0.04 < np.mean(red > blue + 60) < 0.6
    assert np.mean(blue > red + 40) > 0.25


def test_nothing_of_a_shape_is_cut_off() -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for _ in range(20):
            pixels = np.asarray(draw(Scene(shape, "white", "black", "anime"), rng)).astype(int).max(-1)
            border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert border.max() < 128


def test_captions_name_everything_once() -> None:
    assert SCENE.caption == "an anime drawing of an orange star on a blue background"
    scenes = list(all_scenes())
    assert len(scenes) == len(STYLES) * len(SHAPES) * len(COLORS) * (len(COLORS) - 1)
    assert len({scene.caption for scene in scenes}) == len(scenes)


def test_near_misses_change_one_attribute_and_stay_possible() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        for attribute, miss in near_misses(SCENE, rng).items():
            changed = [
                name
                for name in ("shape", "color", "background", "style")
                if getattr(miss, name) != getattr(SCENE, name)
            ]
            assert changed == [attribute]
            assert miss.color != miss.background
