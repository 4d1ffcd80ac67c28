"""HPS checkpoints: the conversion against a forward written here, from open_clip's description, with none of its code.

Axes: B = pictures or prompts, N = tokens, D = width of a tower.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from teefusion import hps
from teefusion.errors import ScorerError
from teefusion.open_clip import VIT_H_14, Architecture, Tower, clip_config, convert, layout
from teefusion.preprocessing import resize_and_pad, to_tensor
from teefusion.scorer_names import hps_version
from teefusion.scorer_sources import find_scorer
from teefusion.scoring import load_scorer

TINY = Architecture(
    text=Tower(width=16, layers=2, heads=2),
    vision=Tower(width=24, layers=2, heads=3),
    embedding=8,
    image_size=16,
    patch_size=8,
    context=12,
    vocabulary=54,
    end_of_text=53,
)


def random_weights(architecture: Architecture = TINY) -> dict[str, Tensor]:
    """Of a size that makes attention and activations far from linear."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if len(shape) > 1 else 4)
        for name, shape in layout(architecture).items()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": random_weights()}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's tokenizer over single letters; as in the published vocabulary, the end token is the last one."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    CLIPTokenizer(vocab={name: k for k, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    return folder


# open_clip's forward, by hand


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block(x_BND: Tensor, weights: dict[str, Tensor], name: str, tower: Tower, *, causal: bool) -> Tensor:
    """Attention by loops over heads, then the MLP with the exact GELU."""
    width = tower.width // tower.heads
    inputs = norm(x_BND, weights, f"{name}.ln_1")
    fused = inputs @ weights[f"{name}.attn.in_proj_weight"].T + weights[f"{name}.attn.in_proj_bias"]
    query, key, value = (fused[..., k * tower.width : (k + 1) * tower.width] for k in range(3))
    heads = []
    for head in range(tower.heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        if causal:
            logits = logits + torch.full(logits.shape[-2:], -math.inf).triu(1)
        heads.append(torch.softmax(logits, -1) @ value[..., part])
    attended = torch.cat(heads, -1) @ weights[f"{name}.attn.out_proj.weight"].T
    x_BND = x_BND + attended + weights[f"{name}.attn.out_proj.bias"]
    hidden = norm(x_BND, weights, f"{name}.ln_2") @ weights[f"{name}.mlp.c_fc.weight"].T
    hidden = hidden + weights[f"{name}.mlp.c_fc.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x_BND + hidden @ weights[f"{name}.mlp.c_proj.weight"].T + weights[f"{name}.mlp.c_proj.bias"]


def encode_text(weights: dict[str, Tensor], ids_BN: Tensor) -> Tensor:
    """Read off where the id is largest."""
    x_BND = weights["token_embedding.weight"][ids_BN] + weights["positional_embedding"]
    for k in range(TINY.text.layers):
        x_BND = block(x_BND, weights, f"transformer.resblocks.{k}", TINY.text, causal=True)
    x_BND = norm(x_BND, weights, "ln_final")
    return x_BND[torch.arange(len(ids_BN)), ids_BN.argmax(-1)] @ weights["text_projection"]


def encode_image(weights: dict[str, Tensor], pixels_BCHW: Tensor) -> Tensor:
    """Read off at the class token."""
    patches = pixels_BCHW.unfold(2, 8, 8).unfold(3, 8, 8)  # B, 3, rows, columns, 8, 8
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # B, 4, 192
    x_BND = patches @ weights["visual.conv1.weight"].flatten(1).T
    start = weights["visual.class_embedding"].expand(len(x_BND), 1, -1)
    x_BND = torch.cat([start, x_BND], 1) + weights["visual.positional_embedding"]
    x_BND = norm(x_BND, weights, "visual.ln_pre")
    for k in range(TINY.vision.layers):
        x_BND = block(x_BND, weights, f"visual.transformer.resblocks.{k}", TINY.vision, causal=False)
    return norm(x_BND[:, 0], weights, "visual.ln_post") @ weights["visual.proj"]


def padded(rows: list[list[int]], pad: int) -> Tensor:
    return torch.tensor([row + [pad] * (TINY.context - len(row)) for row in rows])


def prompt_ids(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[52, *rng.integers(0, 52, length).tolist(), 53] for length in lengths]


# The conversion


@torch.no_grad()
def test_pictures_have_the_embedding_that_open_clip_describes(checkpoint: Path) -> None:
    pixels_BCHW = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = hps.load_hps(checkpoint, architecture=TINY).get_image_features(pixel_values=pixels_BCHW).pooler_output
    torch.testing.assert_close(ours, encode_image(random_weights(), pixels_BCHW), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad", [0, 53])
@torch.no_grad()
def test_prompts_have_the_embedding_that_open_clip_describes_whatever_they_are_padded_with(
    checkpoint: Path, pad: int
) -> None:
    rows = prompt_ids(0, 3, 10)
    ids_BN = padded(rows, pad)
    mask_BN = torch.tensor([[1] * len(row) + [0] * (TINY.context - len(row)) for row in rows])
    model = hps.load_hps(checkpoint, architecture=TINY)
    ours = model.get_text_features(input_ids=ids_BN, attention_mask=mask_BN).pooler_output
    torch.testing.assert_close(ours, encode_text(random_weights(), padded(rows, 0)), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 52), max_size=10), st.integers(0, 53))
@torch.no_grad()
def test_where_a_prompt_is_read_off_does_not_depend_on_what_follows_it(inner: list[int], pad: int) -> None:
    model = hps_model()
    row = [52, *inner, 53]
    plain, other = (model.get_text_features(input_ids=padded([row], p)).pooler_output for p in (0, pad))
    torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, encode_text(random_weights(), padded([row], 0)), rtol=1e-4, atol=1e-4)


def hps_model(cache: dict[str, torch.nn.Module] = {}) -> torch.nn.Module:  # noqa: B006  hypothesis has no fixtures
    if not cache:
        from transformers import CLIPModel

        cache["model"] = CLIPModel(clip_config(TINY)).eval()
        cache["model"].load_state_dict(convert(random_weights(), TINY, where="here"))
    return cache["model"]


@torch.no_grad()
def test_the_quick_gelu_of_openais_checkpoints_would_show(checkpoint: Path) -> None:
    pixels_BCHW = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    quick = Architecture(**{**vars(TINY), "activation": "quick_gelu"})
    ours = hps.load_hps(checkpoint, architecture=quick).get_image_features(pixel_values=pixels_BCHW).pooler_output
    assert float((ours - encode_image(random_weights(), pixels_BCHW)).abs().max()) > 1e-3


def test_half_precision_checkpoints_compute_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    torch.save({"state_dict": {name: weight.half() for name, weight in random_weights().items()}}, path)
    model = hps.load_hps(path, architecture=TINY)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    assert not model.training


def test_vit_h_14_has_the_published_names_shapes_and_number_of_parameters() -> None:
    shapes = layout(VIT_H_14)
    # By hand: ten outside the blocks of each tower and six norms' values, twelve a block.
    assert len(shapes) == 8 + 6 + 12 * (24 + 32)
    assert shapes["visual.conv1.weight"] == (1280, 3, 14, 14)
    assert shapes["visual.positional_embedding"] == (257, 1280)
    assert shapes["visual.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert shapes["visual.proj"] == (1280, 1024)
    assert shapes["transformer.resblocks.23.mlp.c_fc.weight"] == (4096, 1024)
    assert shapes["token_embedding.weight"] == (49408, 1024)
    assert shapes["positional_embedding"] == (77, 1024)
    assert sum(math.prod(shape) for shape in shapes.values()) == 986_109_441


def test_vit_h_14_converts_into_every_weight_of_transformers_model_and_no_other() -> None:
    from transformers import CLIPModel

    with torch.device("meta"):
        weights = {name: torch.empty(shape, dtype=torch.float16) for name, shape in layout(VIT_H_14).items()}
        model = CLIPModel(clip_config(VIT_H_14))
    converted = convert(weights, VIT_H_14, where="here")
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert {name: tuple(weight.shape) for name, weight in converted.items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_act, vision.hidden_act, text.eos_token_id) == ("gelu", "gelu", 49407)
    assert (text.num_attention_heads, vision.num_attention_heads) == (16, 16)


# What is none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual.proj"), r"1 missing \(visual\.proj\)"),
        (lambda w: w.update(text_decoder=torch.zeros(1)), r"1 unknown \(text_decoder\)"),
        (
            lambda w: [w.pop(name) for name in list(w) if ".resblocks.1." in name],
            r"24 missing \(transformer.resblocks.1.attn.in_proj_bias, .*, \.\.\.\)",
        ),
        (
            lambda w: w.update({"visual.proj": torch.zeros(24, 9)}),
            r"another shape: visual.proj is \(24, 9\), expected \(24, 8\)",
        ),
    ],
)
def test_weights_that_are_not_this_clip_are_refused_by_name(change: object, message: str) -> None:
    weights = random_weights()
    change(weights)  # type: ignore[operator]
    with pytest.raises(ScorerError, match=message):
        convert(weights, TINY, where="file.pt")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "HPS_v2.1.pt"
    torch.save({"state_dict": random_weights(), "extra": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(ScorerError, match="cannot be read as an HPS checkpoint"):
        hps.load_hps(path, architecture=TINY)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{}, {"state_dict": 1}, {"state_dict": {"a": "b"}}, [1]])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ScorerError, match="no 'state_dict' of tensors"):
        hps.load_hps(tmp_path / "x.pt")


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_file_that_broke_off_is_refused(tmp_path: Path, checkpoint: Path, kept: int) -> None:
    (tmp_path / "x.pt").write_bytes(checkpoint.read_bytes()[:kept])
    with pytest.raises(ScorerError, match="cannot be read as an HPS checkpoint"):
        hps.load_hps(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("location", "given", "expected"),
    [
        ("/models/HPS_v2_compressed.pt", None, "v2.0"),
        ("s3://bucket/HPS_v2.1_compressed.pt", None, "v2.1"),
        ("HPSv2.1.pt", None, "v2.1"),
        ("HPSv2/pytorch.pt", "v2.1", "v2.1"),  # a folder's name says nothing
        ("v2.0", None, "v2.0"),
        ("v2.1", "v2.1", "v2.1"),
    ],
)
def test_the_version_is_told_by_the_name_or_given(location: str, given: str | None, expected: str) -> None:
    assert hps_version(location, given) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("location", "given", "message"),
    [
        ("model.pt", None, "name of model.pt does not say which HPS it is. Set evaluate.scorer_version"),
        ("HPS_v2.1.pt", "v2.0", "is v2.1 by its name, and evaluate.scorer_version says v2.0"),
        ("HPS_v2.2.pt", None, "does not say which HPS"),
        ("HPS_v21.pt", None, "does not say which HPS"),
    ],
)
def test_a_version_that_is_unclear_is_refused(location: str, given: str | None, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        hps_version(location, given)  # type: ignore[arg-type]


# As a scorer


@pytest.fixture
def tiny_hps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hps.load_hps, "__kwdefaults__", {"architecture": TINY})


@pytest.mark.usefixtures("tiny_hps")
@pytest.mark.parametrize("antialias", [True, False])
def test_a_score_is_100_times_the_cosine_of_open_clips_embeddings(
    checkpoint: Path, tokenizer_folder: Path, antialias: bool
) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((40, 40, 3), (20, 50, 3))]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.stack([resize_and_pad(to_tensor(image), 16, antialias=antialias) for image in images])
    image_BD = encode_image(random_weights(), (pixels - mean[:, None, None]) / std[:, None, None])
    # "ab" is a, b with the end of a word; the second prompt is cut, its last token the end.
    a, end = ord("a") - ord("a"), 26
    rows = [[52, a, end + 1, 53], [52, *(end + k for k in range(10)), 53]]
    text_BD = encode_text(random_weights(), padded(rows, 0))
    expected = 100 * torch.nn.functional.cosine_similarity(image_BD, text_BD)
    source = find_scorer(f"hps:{checkpoint}", tokenizer=str(tokenizer_folder), antialias=antialias)
    scores = load_scorer(source, device="cpu").score(images, ["AB", " ".join("abcdefghijklmn")])
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.usefixtures("tiny_hps")
def test_a_result_names_scorer_version_digests_and_preprocessing(checkpoint: Path, tokenizer_folder: Path) -> None:
    import hashlib

    source = find_scorer(f"hps:{checkpoint}", tokenizer=str(tokenizer_folder), antialias=False)
    scorer = load_scorer(source, device="cpu")
    described = json.loads(json.dumps(scorer.describe()))
    assert (scorer.name, described["name"], described["version"]) == ("HPS v2.1", "HPS v2.1", "v2.1")
    assert described["weights_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert len(described["tokenizer_sha256"]) == 64
    assert described["preprocessing"]["antialias"] is False
    assert described["preprocessing"]["resize"] == "longest side to 16, bicubic"
    assert "curly quotes" in described["text"]


@pytest.mark.usefixtures("tiny_hps")
def test_a_tokenizer_with_another_end_token_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    names = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    CLIPTokenizer(vocab={name: k for k, name in enumerate(names)}, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(ScorerError, match="its end token is number 1, the text model is read off at 53"):
        load_scorer(find_scorer(f"hps:{checkpoint}", tokenizer=str(tmp_path)), device="cpu")


def test_a_missing_tokenizer_or_checkpoint_is_an_error_that_says_what_to_set(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="Set evaluate.tokenizer to a folder that has one"):
        find_scorer(f"hps:{checkpoint}", tokenizer=str(tmp_path))
    with pytest.raises(ScorerError, match=r"HPS_v2\.1\.pt is no file. Set evaluate\.scorer to hps: and the path"):
        find_scorer(f"hps:{tmp_path}/HPS_v2.1.pt")


def test_the_identity_follows_the_bytes_and_not_the_place(checkpoint: Path, tokenizer_folder: Path) -> None:
    other = checkpoint.with_name("HPS_v2.1_copy.pt")
    other.write_bytes(checkpoint.read_bytes())
    words = str(tokenizer_folder)
    first, copied = (find_scorer(f"hps:{path}", tokenizer=words).identity() for path in (checkpoint, other))
    assert first == copied
    other.write_bytes(b"other")
    assert find_scorer(f"hps:{other}", tokenizer=words).identity() != first
    assert find_scorer(f"hps:{checkpoint}", tokenizer=words, antialias=False).identity() != first


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a dog&#39;s “house”", 'a dog\'s "house"'),
        ("it’s &amp;amp; that", "it's & that"),
        ("&rsquo;", "'"),
        ("ﬁlm", "film"),
        (" plain ", "plain"),
    ],
)
def test_prompts_are_cleaned_as_for_open_clip(prompt: str, expected: str) -> None:
    assert hps.clean(prompt) == expected
