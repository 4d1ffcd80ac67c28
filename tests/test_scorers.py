"""Which scorer a setting names, where its files come from, and what CLIPScore and PickScore make of the cosine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from teefusion.errors import NotFoundError, ScorerError, SettingsError
from teefusion.preprocessing import Preprocessing, resize_and_crop
from teefusion.scorer_names import ScorerName, parse_scorer
from teefusion.scorer_sources import find_scorer, scorer_of
from teefusion.scoring import load_scorer
from teefusion.settings import StorageSettings, load_settings
from tests.s3 import BUCKET, ENVIRONMENT, s3_server

PROMPTS = ("a red star", "two black moons", "ring", "a box")


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


# Names


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        ("bundled:shapes", ScorerName("folder", "bundled:shapes")),
        ("/models/clip", ScorerName("folder", "/models/clip")),
        ("hps:s3://bucket/HPS_v2.1_compressed.pt", ScorerName("hps", "s3://bucket/HPS_v2.1_compressed.pt")),
        ("clip:openai/clip-vit-large-patch14", ScorerName("clip", "openai/clip-vit-large-patch14")),
        ("pickscore:yuvalkirstain/PickScore_v1", ScorerName("pickscore", "yuvalkirstain/PickScore_v1")),
    ],
)
def test_a_prefix_says_the_kind(scorer: str, expected: ScorerName) -> None:
    assert parse_scorer(scorer) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scorer": "hps:"}, "names no weights. Write hps:WHERE"),
        ({"scorer": "bundled:hps"}, "no bundled scorer 'bundled:hps'"),
        ({"scorer": "hps:/models/model.pt"}, "does not say which HPS it is"),
        ({"scorer": "clip:/models/clip", "scorer_version": "v2.1"}, "scorer_version is of hps: scorers alone"),
        ({"scorer": "clip:/models/clip", "antialias": False}, "clip: was published with it"),
        ({"scorer": "hps:v2.1", "scorer_version": "v3"}, "scorer_version"),
    ],
)
def test_a_scorer_that_cannot_be_is_refused_before_anything_is_spent(
    overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(overrides={f"evaluate.{name}": value for name, value in overrides.items()})


def test_settings_name_the_scorer_that_is_found(tiny_scorer: Path) -> None:
    source = scorer_of(
        load_settings(
            overrides={
                "evaluate.scorer": str(tiny_scorer),
                "evaluate.antialias": False,
                "evaluate.transparency": "refuse",
            }
        )
    )
    assert (source.kind, source.path, source.antialias, source.transparency) == ("folder", tiny_scorer, False, "refuse")


# Files


@pytest.mark.parametrize("scorer", ["clip:owner/none", "pickscore:owner/none", "hps:v2.1"])
def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_else_to_do(
    scorer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ScorerError, match=r"Cannot fetch '.*' from the hub: .*give their path"):
        find_scorer(scorer)


def hub_cache(folder: Path, files: Path) -> None:
    """What a download leaves, with a file of another program's beside."""
    repository = folder / "models--owner--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    shutil.copytree(files, repository / "snapshots" / ("c" * 40))


def test_a_hub_id_is_known_by_its_commit_and_by_the_files_that_are_used(
    tiny_scorer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, tiny_scorer)
    source = find_scorer("clip:owner/clip")
    assert source.name == "CLIPScore (owner/clip)"
    assert source.revision == "c" * 40
    (source.path / "pytorch_model.bin").write_bytes(b"of another program")
    assert find_scorer("clip:owner/clip").weights_sha256 == source.weights_sha256
    assert load_scorer(source, device="cpu").describe()["revision"] == "c" * 40


def test_a_revision_of_what_is_not_on_the_hub_is_refused(tiny_scorer: Path) -> None:
    with pytest.raises(ScorerError, match="scorer_revision is 'abc', but .* is not on the hub"):
        find_scorer(f"clip:{tiny_scorer}", revision="abc")


def test_weights_without_a_tokenizer_take_the_one_of_the_settings(tiny_scorer: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_scorer, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    source = find_scorer(f"clip:{folder}", tokenizer=str(tiny_scorer))
    assert source.tokenizer_sha256 is not None
    images = pictures((16, 16))
    whole = load_scorer(f"clip:{tiny_scorer}", device="cpu").score(images, PROMPTS[:1])
    assert load_scorer(source, device="cpu").score(images, PROMPTS[:1]) == whole


def test_a_checkpoint_in_s3_is_copied_once_and_again_when_its_size_changes(
    tiny_scorer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teefusion.storage import open_store

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as url:
        storage = StorageSettings(endpoint_url=url, addressing_style="path")
        store = open_store(f"s3://{BUCKET}/models", storage)

        def find() -> Path:
            uri = f"hps:s3://{BUCKET}/models/HPS_v2.1_compressed.pt"
            return find_scorer(uri, tokenizer=str(tiny_scorer), storage=storage, copies=tmp_path / "scorers").path

        with pytest.raises(NotFoundError, match=r"HPS_v2\.1_compressed\.pt is missing"):
            find()
        store.write("HPS_v2.1_compressed.pt", b"weights")
        copy = find()
        written = copy.stat().st_mtime_ns
        assert copy.read_bytes() == b"weights"
        assert find().stat().st_mtime_ns == written
        store.write("HPS_v2.1_compressed.pt", b"other weights")
        assert find().read_bytes() == b"other weights"


# Preprocessing


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (33, 20), (20, 50), (8, 12)])
def test_crop_is_what_transformers_clip_processor_does(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    (image,) = pictures(size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    torch.testing.assert_close(Preprocessing(size=16, fit="crop")(image), theirs.float(), rtol=0, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["pad", "crop"]), st.booleans())
def test_every_picture_becomes_a_square_of_finite_numbers(width: int, height: int, fit: str, antialias: bool) -> None:
    prepare = Preprocessing(size=14, fit=fit, antialias=antialias)  # type: ignore[arg-type]
    pixels_CHW = prepare(Image.new("RGB", (width, height), (200, 100, 50)))
    assert pixels_CHW.shape == (3, 14, 14)
    assert bool(torch.isfinite(pixels_CHW).all())


def test_the_border_is_black_before_it_is_normalised() -> None:
    pixels_CHW = Preprocessing(size=4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))(Image.new("RGB", (4, 2), "white"))
    assert pixels_CHW[0, :, 0].tolist() == [-2.0, 2.0, 2.0, -2.0]


def test_the_crop_keeps_the_centre() -> None:
    image = Image.new("RGB", (6, 2), "black")
    image.paste((255, 255, 255), (2, 0, 4, 2))
    assert resize_and_crop(image, 2).getextrema() == ((255, 255),) * 3


def test_transparency_is_refused_where_settings_say_so_and_an_opaque_alpha_is_not() -> None:
    prepare = Preprocessing(size=4, transparency="refuse")
    with pytest.raises(ScorerError, match="partly transparent, and evaluate.transparency is 'refuse'"):
        prepare(Image.new("RGBA", (4, 4), (255, 0, 0, 254)))
    opaque = prepare(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))
    torch.testing.assert_close(opaque, prepare(Image.new("RGB", (4, 4), (255, 0, 0))))
    assert prepare.describe()["transparency"] == "refused"


# Scores


def logits(folder: Path, images: list[Image.Image]) -> tuple[torch.Tensor, float]:
    """exp(logit_scale) * cosine of each pair, and exp(logit_scale), by transformers alone."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = torch.tensor(np.stack(processor(images)["pixel_values"]))
    tokens = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
        return output, float(model.logit_scale.exp())


@pytest.fixture(scope="module")
def scaled_clip(tiny_scorer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logit scale other than the one that every CLIP starts from."""
    folder = Path(shutil.copytree(tiny_scorer, tmp_path_factory.mktemp("scorers") / "scaled"))
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"].fill_(3.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_pickscore_is_the_scaled_cosine_and_clipscore_its_positive_part(scaled_clip: Path) -> None:
    images = pictures((40, 40), (33, 20), (20, 50), (16, 16))
    expected, factor = logits(scaled_clip, images)
    assert factor == pytest.approx(np.exp(3.0))
    pick = load_scorer(f"pickscore:{scaled_clip}", device="cpu").score(images, PROMPTS)
    assert pick == pytest.approx(expected.tolist(), abs=1e-3)
    clip = load_scorer(f"clip:{scaled_clip}", device="cpu").score(images, PROMPTS)
    assert clip == pytest.approx([max(0.0, 100 * value / factor) for value in expected.tolist()], abs=1e-3)
    assert min(pick) < 0 < max(pick)  # so that both branches were looked at
    assert min(clip) == 0


def test_a_result_says_what_its_score_is(scaled_clip: Path) -> None:
    described = json.loads(json.dumps(load_scorer(f"pickscore:{scaled_clip}", device="cpu").describe()))
    assert described["kind"] == "pickscore"
    assert described["name"] == f"PickScore ({scaled_clip})"
    assert described["score"] == "exp(logit_scale) * cosine(image, text), float32"
    assert described["preprocessing"]["resize"] == "shortest side to 16, bicubic"
    assert described["preprocessing"]["crop"] == "centre"
    assert described["text"] == "as it is"
