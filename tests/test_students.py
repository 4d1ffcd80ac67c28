"""A student pipeline is used as StableDiffusion3Pipeline is, with one transformer call a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from teefusion.errors import StudentError
from teefusion.fusion import make_fusion
from teefusion.student_pipelines import StudentPipeline
from teefusion.students import load_student, make_student, save_student


@pytest.fixture(scope="module")
def student(tiny_teacher: Path) -> Any:
    teacher = StableDiffusion3Pipeline.from_pretrained(tiny_teacher, text_encoder_3=None, tokenizer_3=None)
    return make_student(teacher, make_fusion("paper"), max_sequence_length=0)


@pytest.fixture
def calls(student: Any) -> Iterator[list[int]]:
    """Batch size of each transformer call."""
    sizes: list[int] = []
    hook = student.transformer.register_forward_hook(lambda module, args, output: sizes.append(output[0].shape[0]))
    yield sizes
    hook.remove()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_transformer_call_a_step_at_any_guidance(student: Any, calls: list[int]) -> None:
    for scale in (0.0, 1.0, 4.0, 20.0):
        calls.clear()
        student("a", guidance_scale=scale, num_inference_steps=5, generator=seeded())
        assert calls == [1] * 5


def test_lists_of_prompts_and_images_share_each_call(student: Any, calls: list[int]) -> None:
    images = student(["a", "b", "c"], num_images_per_prompt=2, num_inference_steps=3, generator=seeded()).images
    assert len(images) == 6
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in images)
    assert calls == [6, 6, 6]


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [("np", np.ndarray, (1, 16, 16, 3)), ("pt", torch.Tensor, (1, 3, 16, 16)), ("latent", torch.Tensor, (1, 4, 8, 8))],
)
def test_output_types(student: Any, output_type: str, kind: type, shape: tuple[int, ...]) -> None:
    images = student("a", num_inference_steps=2, output_type=output_type, generator=seeded()).images
    assert isinstance(images, kind)
    assert images.shape == shape


def test_return_dict_false_gives_a_tuple(student: Any) -> None:
    (images,) = student("a", num_inference_steps=2, return_dict=False, generator=seeded())
    assert len(images) == 1


def test_guidance_changes_the_picture_and_the_seed_fixes_it(student: Any) -> None:
    def latents(scale: float, seed: int = 0) -> torch.Tensor:
        options = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": scale}
        return student("star", generator=seeded(seed), **options).images

    assert torch.equal(latents(4.0), latents(4.0))
    assert not torch.equal(latents(4.0), latents(7.0))
    assert not torch.equal(latents(4.0), latents(4.0, seed=1))


def test_one_guidance_scale_a_picture_is_as_good_as_one_call_each(student: Any, calls: list[int]) -> None:
    options = {"num_inference_steps": 3, "output_type": "latent"}
    scales = [1.0, 3.0, 5.0]
    calls.clear()
    together = student(["a"] * 3, guidance_scale=scales, generator=[seeded() for _ in scales], **options).images
    assert calls == [3] * 3
    alone = [student("a", guidance_scale=s, generator=seeded(), **options).images for s in scales]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="holds 2 numbers for 3 pictures"):
        student(["a"] * 3, guidance_scale=[1.0, 2.0], **options)


def test_a_callback_sees_every_step_and_can_change_latents(student: Any) -> None:
    seen: list[int] = []

    def zero(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = student("a", num_inference_steps=4, callback_on_step_end=zero, output_type="latent").images
    assert seen == [0, 1, 2, 3]
    assert float(latents.abs().max()) == 0.0


def test_embeddings_given_by_the_caller_are_used(student: Any) -> None:
    student._guidance_scale = 4.0
    tokens, _, pooled, _ = StableDiffusion3Pipeline.encode_prompt(
        student, "star", None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    by_text = student("star", generator=seeded(), **options).images
    by_embedding = student(prompt_embeds=tokens, pooled_prompt_embeds=pooled, generator=seeded(), **options).images
    torch.testing.assert_close(by_text, by_embedding)


def test_a_negative_prompt_is_refused_and_an_empty_one_is_not(student: Any) -> None:
    with pytest.raises(ValueError, match="no negative prompt"):
        student("a", negative_prompt="ugly", num_inference_steps=2)
    student("a", negative_prompt="", num_inference_steps=2)


def test_save_and_load_round_trip(student: Any, tmp_path: Path) -> None:
    save_student(student, tmp_path / "student")
    copy = load_student(tmp_path / "student")
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    assert torch.equal(
        student("moon", generator=seeded(), **options).images, copy("moon", generator=seeded(), **options).images
    )
    assert copy.config.max_sequence_length == 0
    assert not list((tmp_path / "student").rglob("*.bin"))


def test_the_stock_class_loads_a_students_weights(student: Any, tmp_path: Path) -> None:
    save_student(student, tmp_path / "student")
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path / "student", text_encoder_3=None, tokenizer_3=None)
    state = student.transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in stock.transformer.state_dict().items())


def test_it_runs_in_bfloat16(student: Any, tmp_path: Path) -> None:
    save_student(student, tmp_path / "student")
    half = load_student(tmp_path / "student", dtype=torch.bfloat16)
    latents = half("a", num_inference_steps=2, guidance_scale=4.0, output_type="latent").images
    assert latents.dtype == half.transformer.dtype == torch.bfloat16
    assert bool(torch.isfinite(latents.float()).all())


def test_a_students_guidance_mlp_survives_the_round_trip(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = StableDiffusion3Pipeline.from_pretrained(tiny_teacher, text_encoder_3=None, tokenizer_3=None)
    student = make_student(teacher, make_fusion("distill_cfg"), max_sequence_length=0)
    torch.nn.init.normal_(student.transformer.time_text_embed.scale_embedder.linear_2.weight)
    save_student(student, tmp_path / "student")  # which compares the copy's weights and pictures
    file = tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    _rewrite(file, lambda state: {name: v for name, v in state.items() if "scale_embedder" not in name})
    with pytest.raises(StudentError, match="holds no guidance MLP"):
        load_student(tmp_path / "student")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_that_lacks_a_weight_is_refused(student: Any, tmp_path: Path, part: str) -> None:
    """Diffusers and transformers would go on with a random one."""
    save_student(student, tmp_path / "student")
    (file,) = (tmp_path / "student" / part).glob("*.safetensors")
    lost: list[str] = []

    def lose_one(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        lost.append(sorted(state)[3])
        return {name: value for name, value in state.items() if name != lost[0]}

    _rewrite(file, lose_one)
    with pytest.raises(StudentError, match=f"{part} lacks 1 of its weights, {lost[0]}"):
        load_student(tmp_path / "student")


def test_guidance_outside_the_trained_range_warns_once(tiny_teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = StableDiffusion3Pipeline.from_pretrained(tiny_teacher, text_encoder_3=None, tokenizer_3=None)
    student = make_student(teacher, make_fusion("paper"), max_sequence_length=0, guidance_range=(1.0, 7.0))
    for scale in (1.0, 4.0, 7.0):
        student("a", guidance_scale=scale, num_inference_steps=1)
    assert "outside" not in caplog.text
    for scale in (7.5, 20.0):
        student("a", guidance_scale=scale, num_inference_steps=1)
    assert caplog.text.count("guidance_scale 7.5 is outside [1, 7]") == 1
    assert caplog.text.count("outside") == 1


def published_folder(tiny_teacher: Path, folder: Path) -> Path:
    """The tiny teacher dressed as the authors' release: classes and flags of its own, weights as they are."""
    shutil.copytree(tiny_teacher, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusion3TeEFusionPipeline", "transformer": ["sd3_model", "SD3Model"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"_class_name": "SD3Model", "txt_align_guidance": True, "guidance": False}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "transformer" / "sd3_model.py").write_text("raise SystemExit('code of a model was run')")
    return folder


def test_a_student_in_the_authors_format_is_the_published_formula(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = published_folder(tiny_teacher, tmp_path / "released")
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    teacher = StableDiffusion3Pipeline.from_pretrained(tiny_teacher, text_encoder_3=None, tokenizer_3=None)
    ours = make_student(teacher, make_fusion("published"), max_sequence_length=256)("a", generator=seeded(), **options)
    for released in (StudentPipeline.from_pretrained(folder), load_student(folder)):
        assert released.transformer.time_text_embed.fusion == make_fusion("published")
        assert torch.equal(released("a", generator=seeded(), **options).images, ours.images)
    assert StudentPipeline.from_pretrained(folder, rounded=True).transformer.time_text_embed.fusion.rounded


def test_a_pipeline_without_fusion_is_refused(tiny_teacher: Path) -> None:
    with pytest.raises(StudentError, match="no student: model_index.json has no 'fusion'"):
        StudentPipeline.from_pretrained(tiny_teacher)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "is no student folder: model_index.json is missing"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda f: shutil.rmtree(f / "transformer"), "cannot be loaded as a student"),
        (
            lambda f: _truncate(f / "transformer" / "diffusion_pytorch_model.safetensors"),
            "cannot be loaded as a student",
        ),
        (lambda f: _set_fusion(f, {"variant": "mystery"}), "'fusion' is not usable"),
        (lambda f: _set_fusion(f, None), "no student"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_message(student: Any, tmp_path: Path, damage: Any, message: str) -> None:
    save_student(student, tmp_path / "student")
    damage(tmp_path / "student")
    with pytest.raises(StudentError, match=message):
        load_student(tmp_path / "student")


def _rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _set_fusion(folder: Path, value: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["fusion"] = value
    (folder / "model_index.json").write_text(json.dumps(index))
