"""Estimates against hand counts, published sizes, and sets that were really made."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from teefusion.architectures import TeacherShape, architecture, bundled_architectures, teacher_shape
from teefusion.errors import SettingsError, TeacherError
from teefusion.estimates import DEVICES, device_reported_as, estimate_targets, file_bytes, find_device, text
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings, TeacherSettings, load_settings, presets
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore
from teefusion.target_sets import generate_targets
from tests.test_families import SD35

Make = Callable[..., Settings]
# A shape for tests of the arithmetic alone: 1000 FLOPs a forward.
SHAPE = TeacherShape(
    parameters=500,
    weights_bytes=1000,
    forward_flops=1000,
    latent_shape=(4, 8, 8),
    pixels=(64, 64),
    text_tokens=10,
    text_width=32,
    pooled_width=16,
)


def estimate(overrides: dict[str, Any] | None = None, device: str = "H200", **options: Any) -> Any:
    settings = load_settings(overrides={"teacher.name": "sd3-medium"} | (overrides or {}))
    return estimate_targets(settings, device, **({"shape": SHAPE} | options))


# --- forwards, FLOPs, hours --------------------------------------------------------------------------------------


def test_forwards_are_those_of_both_splits_at_the_strategys_price() -> None:
    small = {"targets.trajectories": 100, "targets.heldout_trajectories": 20, "strategy.num_steps": 10}
    cfg, w2sd = estimate(small), estimate(small | {"strategy.name": "w2sd"})
    assert (cfg.forwards, cfg.flops) == (120 * 2 * 10, 120 * 2 * 10 * 1000)
    assert w2sd.forwards == 120 * (5 * 10 - 3)  # two strong, one weak, two normal; the last step reflects nothing


def test_pictures_cost_their_kept_steps_alone(tmp_path: Path) -> None:
    small = {"targets.trajectories": 100, "targets.heldout_trajectories": 20, "strategy.num_steps": 10}
    noised = estimate(small | {"targets.images": str(tmp_path), "targets.states_per_trajectory": 4})
    assert noised.forwards == 120 * 2 * 4


def test_hours_are_flops_over_the_share_of_the_peak() -> None:
    given = estimate(device="mycard:500", utilisation=0.25)
    assert given.gpu_hours == pytest.approx(given.flops / (500e12 * 0.25) / 3600)
    assert (given.device, given.memory_bytes, given.utilisation_assumed) == ("mycard", None, False)
    assert "25% of the peak (as given)" in text(given)


def test_an_assumed_utilisation_is_shown_as_such() -> None:
    assumed = estimate()
    assert assumed.utilisation_assumed
    assert "40% of the peak (assumed" in text(assumed)


def test_ten_million_prompts_take_what_arithmetic_says() -> None:
    block = {"targets.shard_trajectories": 64}
    large = estimate(block | {"targets.trajectories": 10_000_000, "targets.heldout_trajectories": 1000})
    payload = 10_001_000 * (10 * 32 + 16) * 2
    assert large.embeddings_bytes == pytest.approx(payload, rel=0.01)
    assert large.files == 2 * (10_000_000 // 64 + 16) + 1
    assert f"{large.prompts:,} prompts" in text(large)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_utilisation_is_refused(share: float) -> None:
    with pytest.raises(SettingsError, match=r"lies in \(0, 1\]"):
        estimate(utilisation=share)


# --- devices -----------------------------------------------------------------------------------------------------


def test_devices_are_found_in_any_case() -> None:
    assert find_device("h200") is DEVICES["H200"]
    assert find_device("my:card:2.5").peak_flops == 2.5e12


@pytest.mark.parametrize("name", ["H2000", "mycard:", "mycard:fast", ":500", "500", "mycard:-1", "mycard:inf", ""])
def test_an_unknown_device_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(SettingsError, match="Known: H200, H100-SXM, A100, L40S, RTX-4090.*mycard:500"):
        find_device(name)


def test_the_drivers_names_are_matched_whole() -> None:
    assert device_reported_as("NVIDIA H200") is DEVICES["H200"]
    assert device_reported_as("NVIDIA GH200 480GB") is None  # another device
    assert device_reported_as("NVIDIA H100 PCIe") is None


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float16")])
def test_bytes_and_forwards_are_those_of_a_real_set(
    make_settings: Make, tmp_path: Path, dtypes: tuple[str, str]
) -> None:
    settings = make_settings({"teacher.dtype": dtypes[0], "targets.dtype": dtypes[1], "targets.trajectories": 11})
    prompts = load_prompt_set(Path(ingest(settings).output))
    manifest = generate_targets(settings, prompts, FolderStore(tmp_path / "set"))
    made = estimate_targets(settings, "H200", prompts=(len(prompts.train), len(prompts.heldout)))
    splits = (manifest.train, manifest.heldout)
    assert made.forwards == manifest.forwards
    assert made.states == sum(split.rows for split in splits)
    stored = sum(record.bytes for split in splits for record in split.states)
    assert made.states_bytes == pytest.approx(stored, rel=0.01)
    embedded = [manifest.null, *(record for split in splits for record in split.embeddings)]
    assert made.embeddings_bytes == pytest.approx(sum(record.bytes for record in embedded), rel=0.01)
    files = list((tmp_path / "set").rglob("*.safetensors"))
    assert made.files == len(files)
    assert made.bytes == pytest.approx(sum(path.stat().st_size for path in files), rel=0.01)


def test_prompts_that_go_round_are_embedded_once() -> None:
    counts = {"targets.trajectories": 1000, "targets.heldout_trajectories": 100, "targets.shard_trajectories": 64}
    few = estimate(counts, prompts=(200, 500))
    assert few.prompts == 200 + 100
    assert few.embeddings_bytes == pytest.approx(301 * (10 * 32 + 16) * 2, rel=0.01)


def test_a_files_bytes_are_those_that_safetensors_writes() -> None:
    from safetensors.torch import save

    tensors = {"x": torch.zeros(3, 4, dtype=torch.bfloat16), "n": torch.zeros(3, dtype=torch.int64)}
    assert file_bytes({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}) == len(
        save(tensors)
    )


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "billions"),
    [  # of the model cards, with the position table, which is stored with SD3's parameters
        ("sd3-medium", (2.0, 2.1)),
        ("sd3.5-medium", (2.2, 2.5)),
        ("sd3.5-large", (8.0, 8.2)),
        ("flux.1-schnell", (11.85, 11.95)),
    ],
)
def test_published_teachers_have_their_published_size(preset: str, billions: tuple[float, float]) -> None:
    shape = teacher_shape(load_settings(overrides={"teacher.name": preset}).teacher)
    assert billions[0] <= shape.parameters / 1e9 <= billions[1]
    assert billions[0] <= shape.weights_bytes / 2e9 <= billions[1]  # two bytes each
    assert (shape.latent_shape, shape.pixels) == ((16, 128, 128), (1024, 1024))
    assert (shape.text_tokens, shape.text_width) == (256 if preset.startswith("flux") else 333, 4096)


def test_each_published_preset_has_its_configs() -> None:
    bundled = bundled_architectures()
    uris = {name: load_settings(overrides={"teacher.name": name}).teacher.uri for name in presets()}
    assert {name: configs["uri"] for name, configs in bundled.items()} == {
        name: uri for name, uri in uris.items() if not uri.startswith("bundled:")
    }


def linear(rows: int, *widths: int) -> int:
    """FLOPs of a chain of linear layers on so many rows."""
    return sum(2 * rows * a * b for a, b in pairwise(widths))


FLUX_TINY = {
    "attention_head_dim": 12,
    "axes_dims_rope": [4, 4, 4],
    "guidance_embeds": False,
    "in_channels": 16,
    "joint_attention_dim": 20,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "pooled_projection_dim": 28,
}


def make_folder(folder: Path, transformer: Any, clip_tokens: int) -> TeacherSettings:
    """The configs of a teacher whose VAE shrinks pictures twofold, and nothing else of it."""
    configs = {
        "transformer": ("config.json", json.loads(transformer.to_json_string())),
        "vae": ("config.json", {"block_out_channels": [8, 8]}),
        "tokenizer": ("tokenizer_config.json", {"model_max_length": clip_tokens}),
    }
    for part, (name, values) in configs.items():
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps(values))
    return TeacherSettings(name=str(folder), uri=str(folder), height=16, width=16, max_sequence_length=12)


def test_flops_of_an_sd3_forward_are_its_matrix_products(tmp_path: Path) -> None:
    """Counted by hand, attention included, which has to be seen on the meta device."""
    shape = teacher_shape(make_folder(tmp_path, SD3Transformer2DModel(**SD35), clip_tokens=32))
    patches, tokens, width = 4 * 4, 32 + 12, 16
    both = patches + tokens
    attention = 2 * 2 * both * both * width  # queries with keys, then weights with values, over all heads
    ends = (
        linear(patches, 4 * 2 * 2, width)  # patches, by a convolution
        + linear(tokens, 40, width)
        + linear(1, 256, width, width)
        + linear(1, 32, width, width)  # timestep, pooled text
        + linear(1, width, 2 * width)
        + linear(patches, width, 4 * 2 * 2)
    )
    streams = linear(both, width, 4 * width) + linear(both, width, 4 * width, width)  # q, k, v, out; feed forward
    first = streams + attention + linear(1, width, 9 * width) + linear(1, width, 6 * width)
    first += linear(patches, width, 4 * width) + 2 * 2 * patches * patches * width  # the second attention
    # The last block drops the text once attention has read it: no output, no feed forward, a smaller modulation.
    last = linear(both, width, 3 * width) + linear(patches, width, width) + linear(patches, width, 4 * width, width)
    last += attention + linear(1, width, 6 * width) + linear(1, width, 2 * width)
    assert shape.forward_flops == ends + first + last
    assert (shape.latent_shape, shape.text_tokens) == ((4, 8, 8), tokens)


def test_flops_of_a_flux_forward_are_its_matrix_products(tmp_path: Path) -> None:
    """As above; two by two latents are one token of FLUX."""
    shape = teacher_shape(make_folder(tmp_path, FluxTransformer2DModel(**FLUX_TINY), clip_tokens=32))
    patches, tokens, width = 4 * 4, 12, 24
    both = patches + tokens
    attention = 2 * 2 * both * both * width
    ends = (
        linear(patches, 16, width)
        + linear(tokens, 20, width)
        + linear(1, 256, width, width)
        + linear(1, 28, width, width)
        + linear(1, width, 2 * width)
        + linear(patches, width, 16)
    )
    double = linear(both, width, 4 * width) + linear(both, width, 4 * width, width) + attention
    double += 2 * linear(1, width, 6 * width)
    single = (
        linear(both, width, 3 * width) + linear(both, width, 4 * width) + linear(both, 5 * width, width) + attention
    )
    single += linear(1, width, 3 * width)
    assert shape.forward_flops == ends + double + single
    assert (shape.latent_shape, shape.text_tokens) == ((4, 8, 8), tokens)


def test_flops_grow_with_the_picture_and_the_text(tmp_path: Path) -> None:
    settings = make_folder(tmp_path, SD3Transformer2DModel(**SD35), clip_tokens=32)
    base = teacher_shape(settings).forward_flops
    assert teacher_shape(settings.model_copy(update={"height": 8})).forward_flops < base
    assert teacher_shape(settings.model_copy(update={"max_sequence_length": 64})).forward_flops > base


def test_a_built_model_computes_and_its_outline_has_no_weights(tmp_path: Path) -> None:
    shape = architecture(make_folder(tmp_path, SD3Transformer2DModel(**SD35), clip_tokens=32))
    assert {value.device.type for value in shape.outline().transformer.parameters()} == {"meta"}
    real = shape.outline(device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        velocity = shape.family.velocity(
            real.transformer,
            torch.randn(1, 4, 8, 8),
            torch.tensor(500.0),
            torch.randn(1, 44, 40).bfloat16(),
            torch.randn(1, 32).bfloat16(),
        )
    assert bool(torch.isfinite(velocity).all())


def test_an_overridden_uri_is_read_and_not_the_presets(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, SD3Transformer2DModel(**SD35), clip_tokens=32).uri
    preset = load_settings(overrides={"teacher.name": "sd3-medium", "teacher.uri": folder})
    assert architecture(preset.teacher).transformer["num_layers"] == 2


def test_a_teacher_without_readable_configs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(TeacherError, match="transformer/config.json cannot be read.*Give --teacher a preset"):
        architecture(TeacherSettings(name=str(tmp_path), uri=str(tmp_path)))
    with pytest.raises(TeacherError, match="Cannot tell the shape of nobody/nothing.*no network"):
        architecture(TeacherSettings(name="nobody/nothing", uri="nobody/nothing"))
    settings = make_folder(tmp_path, SD3Transformer2DModel(**SD35), clip_tokens=32)
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="does not say its shape: 'block_out_channels' is missing"):
        architecture(settings)


def test_an_estimate_is_json_and_a_table(make_settings: Make) -> None:
    made = estimate_targets(make_settings(), "A100")
    assert json.loads(json.dumps(made.to_dict()))["forwards"] == 16 * 2 * 4
    lines = text(made).splitlines()
    assert len({line.index(line.split("  ", 1)[1].strip()) for line in lines}) == 1  # aligned
    assert "float32 forwards are slower" in text(made)
