"""The CLIP scorer: preprocessing by hand, scores against transformers' own forward, and folders that are none."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from teefusion import scoring
from teefusion.errors import ScorerError
from teefusion.preprocessing import as_rgb, resize_and_pad, to_tensor
from teefusion.scoring import ClipScorer, load_scorer

PROMPTS = ("a red star", "two black moons", "ring")


def pictures(count: int = 3, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, pictures of 16 pixels, prompts of 16 tokens, one token a letter."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = shared | ids | {"vocab_size": len(names), "max_position_embeddings": 16}
    vision = shared | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPTokenizer(vocab={name: k for k, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of_scorer(clip_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_folder, tmp_path / "scorer"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Preprocessing


def test_bicubic_without_antialias_has_the_weights_worked_out_by_hand() -> None:
    # Halved, a sample lies midway between two pixels: weights -3/32, 19/32, 19/32, -3/32 (Keys, a = -0.75).
    line_CHW = torch.zeros(1, 8, 8)
    line_CHW[:, :, 2] = 1
    expected = torch.tensor([-3 / 32, 19 / 32, 0, 0]).expand(1, 4, 4)
    torch.testing.assert_close(resize_and_pad(line_CHW, 4, antialias=False), expected)


def test_antialias_changes_what_a_smaller_picture_shows() -> None:
    stripes_CHW = torch.zeros(1, 8, 8)
    stripes_CHW[:, :, ::4] = 1
    with_it, without_it = (resize_and_pad(stripes_CHW, 4, antialias=value) for value in (True, False))
    assert float((with_it - without_it).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((4, 2), slice(2, 6), slice(0, 8)),  # wide: 8x4, two rows of zeros above and below
        ((2, 4), slice(0, 8), slice(2, 6)),
        ((8, 5), slice(1, 6), slice(0, 8)),  # three rows are missing: one above, two below
        ((5, 8), slice(0, 8), slice(1, 6)),
        ((64, 1), slice(3, 4), slice(0, 8)),  # an eighth of a row is still a row
        ((8, 8), slice(0, 8), slice(0, 8)),
    ],
)
def test_the_longest_side_is_fitted_and_the_rest_is_centred_zeros(
    size: tuple[int, int], rows: slice, columns: slice
) -> None:
    expected = torch.zeros(3, 8, 8)
    expected[:, rows, columns] = 0.5
    torch.testing.assert_close(resize_and_pad(torch.full((3, size[1], size[0]), 0.5), 8, antialias=True), expected)


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture_CHW = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_and_pad(picture_CHW, 8, antialias=True), picture_CHW)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGB", (2, 2), (255, 51, 0)), (1.0, 0.2, 0.0)),
        (Image.new("L", (2, 2), 51), (0.2, 0.2, 0.2)),
        (Image.new("1", (2, 2), 1), (1.0, 1.0, 1.0)),
        (Image.new("RGBA", (2, 2), (255, 51, 0, 255)), (1.0, 0.2, 0.0)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (1.0, 1.0, 1.0)),  # nothing to see: the page
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (0.8, 0.8, 0.8)),  # a fifth of black over white
        (Image.new("LA", (2, 2), (0, 0)), (1.0, 1.0, 1.0)),
    ],
)
def test_every_kind_of_picture_becomes_rgb_and_transparency_shows_white(
    picture: Image.Image, expected: tuple[float, float, float]
) -> None:
    torch.testing.assert_close(to_tensor(as_rgb(picture))[:, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("picture", [Image.new("I;16", (2, 2)), Image.new("F", (2, 2)), Image.new("RGB", (0, 4))])
def test_a_picture_that_would_be_clipped_or_is_empty_is_refused(clip_folder: Path, picture: Image.Image) -> None:
    with pytest.raises(ScorerError, match=f"mode '{picture.mode}' and {picture.width}x{picture.height} pixels"):
        ClipScorer(clip_folder).score([picture], ["a star"])


# Scores


def test_scores_are_100_times_the_cosine_that_transformers_computes(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    images = pictures()
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels_BHWC = (np.stack([np.asarray(image) for image in images]) / 255 - mean) / std
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    tokens = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    pixels_BCHW = torch.tensor(pixels_BHWC, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels_BCHW).logits_per_image / model.logit_scale.exp()
    assert ClipScorer(clip_folder).score(images, PROMPTS) == pytest.approx((100 * logits.diagonal()).tolist(), abs=1e-3)


def test_scores_do_not_depend_on_the_batch_size(clip_folder: Path) -> None:
    images, prompts = pictures(7), [f"a {name} star" for name in "abcdefg"]
    one_by_one = ClipScorer(clip_folder, batch_size=1).score(images, prompts)
    assert ClipScorer(clip_folder, batch_size=3).score(images, prompts) == pytest.approx(one_by_one, abs=1e-3)
    assert len(set(one_by_one)) == 7


def test_scores_stay_float32_under_autocast(clip_folder: Path) -> None:
    scorer, images = ClipScorer(clip_folder), pictures()
    plain = scorer.score(images, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer.score(images, PROMPTS) == plain


def test_the_callers_precision_settings_come_back(clip_folder: Path) -> None:
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    with scoring._full_precision("cpu"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    after = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    assert after == before


def test_nothing_to_score_is_no_error(clip_folder: Path) -> None:
    assert ClipScorer(clip_folder).score([], []) == []


def test_pictures_and_prompts_have_to_pair(clip_folder: Path) -> None:
    with pytest.raises(ScorerError, match="2 pictures cannot be paired with 3 prompts"):
        ClipScorer(clip_folder).score(pictures(2), PROMPTS)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_score_that_is_no_number_is_an_error(copy_of_scorer: Path, value: float) -> None:
    change_weights(copy_of_scorer, lambda weights: weights["visual_projection.weight"].fill_(value))
    with pytest.raises(ScorerError, match=r"gave nan for picture 0 of 3, prompt 'a red star'. Look at that picture"):
        ClipScorer(copy_of_scorer).score(pictures(), PROMPTS)


def test_a_prompt_beyond_the_context_is_cut_counted_and_reported_once(
    clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer, images = ClipScorer(clip_folder), pictures(2)
    fits = " ".join("abcdefghijklmn")  # 14 tokens, begin and end: the context of 16
    longer = fits + " x y z"
    with caplog.at_level(logging.WARNING, logger="teefusion.scoring"):
        scores = scorer.score([images[0], images[0]], [fits, longer])
        scorer.score(images, [longer + " and more", longer])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scorer.truncated_prompts == {longer, longer + " and more"}
    messages = [record.getMessage() for record in caplog.records if record.name == "teefusion.scoring"]
    assert len(messages) == 1
    assert messages[0].startswith("1 of 2 prompts are longer than the 16 tokens that scorer")


# What a scorer says of itself


def test_a_description_is_json_and_names_weights_and_preprocessing(clip_folder: Path) -> None:
    described = json.loads(json.dumps(ClipScorer(clip_folder, name="tiny", antialias=False).describe()))
    assert described["name"] == "tiny"
    assert len(described["weights_sha256"]) == 64
    assert described["preprocessing"]["antialias"] is False
    assert described["preprocessing"]["resize"] == "longest side to 16, bicubic"
    assert described["preprocessing"]["mean"] == [0.48145466, 0.4578275, 0.40821073]


def test_the_digest_follows_the_weights(clip_folder: Path, copy_of_scorer: Path) -> None:
    assert (
        ClipScorer(copy_of_scorer).describe()["weights_sha256"] == ClipScorer(clip_folder).describe()["weights_sha256"]
    )
    change_weights(copy_of_scorer, lambda weights: weights["visual_projection.weight"].mul_(2))
    assert (
        ClipScorer(copy_of_scorer).describe()["weights_sha256"] != ClipScorer(clip_folder).describe()["weights_sha256"]
    )


def test_normalisation_comes_from_the_folder(copy_of_scorer: Path) -> None:
    default = ClipScorer(copy_of_scorer).score(pictures(), PROMPTS)
    (copy_of_scorer / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    scorer = ClipScorer(copy_of_scorer)
    assert scorer.describe()["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert scorer.describe()["preprocessing"]["std"] == [1.0, 1.0, 1.0]
    assert scorer.score(pictures(), PROMPTS) != default


# Folders that are none


@pytest.mark.parametrize(
    "text", ['{"image_mean": [0.5], "image_std": [1, 1, 1]}', '{"image_std": [1, 0, 1]}', "[]", "{"]
)
def test_unusable_preprocessing_is_an_error(copy_of_scorer: Path, text: str) -> None:
    (copy_of_scorer / "preprocessor_config.json").write_text(text)
    with pytest.raises(ScorerError, match=r"preprocessor_config\.json"):
        ClipScorer(copy_of_scorer)


def test_a_missing_folder_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match=r"nowhere is no scorer: config.json is missing. Set evaluate.scorer to"):
        load_scorer(str(tmp_path / "nowhere"), device="cpu")


def test_an_unknown_bundled_scorer_is_an_error() -> None:
    with pytest.raises(ScorerError, match="no bundled scorer 'bundled:hps', only 'bundled:shapes'"):
        load_scorer("bundled:hps", device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "bert"}', "model of type 'bert'"),
        ("{}", "model of type None"),
        ("[]", "no JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_a_folder_with_another_model_is_an_error(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ScorerError, match=message):
        ClipScorer(tmp_path)


def test_pickled_weights_are_never_read(copy_of_scorer: Path) -> None:
    weights = load_file(copy_of_scorer / "model.safetensors")
    torch.save(weights, copy_of_scorer / "pytorch_model.bin")
    (copy_of_scorer / "model.safetensors").unlink()
    with pytest.raises(ScorerError, match="cannot be loaded as a scorer"):
        ClipScorer(copy_of_scorer)


def test_a_missing_weight_is_an_error_not_a_random_number(copy_of_scorer: Path) -> None:
    change_weights(copy_of_scorer, lambda weights: weights.pop("text_projection.weight"))
    with pytest.raises(ScorerError, match="1 weights are missing, the first is text_projection"):
        ClipScorer(copy_of_scorer)


def test_a_weight_of_another_shape_is_an_error(copy_of_scorer: Path) -> None:
    change_weights(copy_of_scorer, lambda weights: weights.update({"text_projection.weight": torch.zeros(8, 3)}))
    with pytest.raises(ScorerError, match="cannot be loaded as a scorer"):
        ClipScorer(copy_of_scorer)


def test_a_damaged_weights_file_is_an_error(copy_of_scorer: Path) -> None:
    data = (copy_of_scorer / "model.safetensors").read_bytes()
    (copy_of_scorer / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ScorerError, match="cannot be loaded as a scorer"):
        ClipScorer(copy_of_scorer)


def test_a_missing_tokenizer_is_an_error_not_an_empty_one(copy_of_scorer: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copy_of_scorer / name).unlink(missing_ok=True)
    with pytest.raises(ScorerError, match="has no tokenizer"):
        ClipScorer(copy_of_scorer)


def test_a_tokenizer_of_another_model_is_an_error(copy_of_scorer: Path) -> None:
    from transformers import CLIPTokenizer

    names = ["<|startoftext|>", "<|endoftext|>", *(f"word{k}</w>" for k in range(100))]
    CLIPTokenizer(vocab={name: k for k, name in enumerate(names)}, merges=[]).save_pretrained(copy_of_scorer)
    with pytest.raises(ScorerError, match="its tokenizer has 102 tokens, its text model 54"):
        ClipScorer(copy_of_scorer)


def test_the_bundled_scorer_prefers_the_right_caption() -> None:
    from teefusion.shapes.drawings import Scene, draw

    right = [
        Scene("star", "red", "blue", "anime"),
        Scene("circle", "yellow", "black", "photo"),
        Scene("cross", "green", "white", "paintings"),
    ]
    wrong = [
        Scene("ring", "green", "pink", "photo"),
        Scene("moon", "blue", "white", "anime"),
        Scene("heart", "pink", "black", "concept-art"),
    ]
    images = [draw(scene, np.random.default_rng(k)) for k, scene in enumerate(right)]
    scorer = load_scorer("bundled:shapes", device="cpu")
    good = scorer.score(images, [scene.caption for scene in right])
    bad = scorer.score(images, [scene.caption for scene in wrong])
    assert all(better > worse for better, worse in zip(good, bad, strict=True))
    assert scorer.name == "bundled:shapes"
