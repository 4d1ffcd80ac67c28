"""The arbiter: a tiny CLIP that tells how well a picture fits its caption, trained apart from the teacher.

Contrastive as CLIP (Radford et al., arXiv 2103.00020), with near misses (captions wrong in one attribute) among the
negatives, so that it must look at everything a caption says.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from teefusion.devices import plain_attention
from teefusion.progress import Progress
from teefusion.shapes.autoencoder import reconstruct
from teefusion.shapes.corpus import CONTEXT, Pool, tokenize
from teefusion.shapes.drawings import SIZE, Scene, all_scenes, near_misses
from teefusion.shapes.optimisation import Optimizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LEARNING_RATE = 1e-3
_RECONSTRUCTIONS = 6_000
_MAX_LOGIT_SCALE = 4.6052  # ln 100, CLIP's own ceiling


def make_arbiter(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """Random weights: pictures of 64 pixels in patches of 8, captions of 16 tokens."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def normalize(pictures_BCHW: Tensor) -> Tensor:
    """From -1..1 to CLIP's statistics."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pictures_BCHW + 1) / 2 - mean) / std


def train_arbiter(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    pool: Pool,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train in place, half on drawings as they are and half as the autoencoder gives them back.

    Generated pictures come out of the autoencoder too, so its traces must not count against them.
    """
    model.train().requires_grad_(True)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    ids_by_caption = {scene.caption: ids for scene, ids in _tokenized(tokenizer)}
    seen = min(_RECONSTRUCTIONS, len(pool.scenes))
    reconstructed = reconstruct(autoencoder, pool.pictures(torch.arange(seen)))
    optimizer = Optimizer(model.parameters(), learning_rate=_LEARNING_RATE, steps=steps, weight_decay=0.05)
    with plain_attention(), Progress("scorer", total=steps, unit="step") as progress:
        for _ in range(steps):
            drawn = torch.randint(len(pool.scenes), (batch_size // 2,), generator=generator)
            again = torch.randint(seen, (batch_size - batch_size // 2,), generator=generator)
            pictures = _worn(torch.cat([pool.pictures(drawn), reconstructed[again]]), generator)
            scenes = [pool.scenes[int(k)] for k in (*drawn, *again)]
            captions = _with_near_misses(scenes, rng)
            loss = _loss(model, pictures, torch.stack([ids_by_caption[caption] for caption in captions]))
            optimizer.step(loss)
            with torch.no_grad():
                model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
            progress.advance(1, note=f"loss {loss.item():.3f}")
    model.eval().requires_grad_(False)


def _tokenized(tokenizer: CLIPTokenizer) -> Iterator[tuple[Scene, Tensor]]:
    scenes = list(all_scenes())
    return zip(scenes, tokenize(tokenizer, [scene.caption for scene in scenes]), strict=True)


def _with_near_misses(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """The captions of the scenes, then four captions for each that are wrong in one attribute."""
    wrong = [miss for scene in scenes for miss in near_misses(scene, rng).values()]
    return [scene.caption for scene in (*scenes, *wrong)]


def _worn(pictures_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """One in four blurred, all with a little noise: a scorer must not mind what a sampler leaves unfinished."""
    pictures = pictures_BCHW.clone()
    small = F.interpolate(pictures[::4], scale_factor=0.5, mode="bilinear", antialias=True)
    pictures[::4] = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
    strength = 0.1 * torch.rand((len(pictures), 1, 1, 1), generator=generator)
    return (pictures + strength * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)


def _loss(model: CLIPModel, pictures_BCHW: Tensor, ids_MT: Tensor) -> Tensor:
    """Contrastive loss of B pictures against M captions, of which the first B are theirs and the others wrong."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids_MT, pixel_values=normalize(pictures_BCHW))
    image_BD, text_MD = output.image_embeds.float(), output.text_embeds.float()
    logits_BM = model.logit_scale.exp() * image_BD @ text_MD.T
    count = len(pictures_BCHW)
    own_B = torch.arange(count)
    # The same caption at another place is no wrong caption.
    same_BM = (ids_MT[:count, None] == ids_MT[None]).all(-1)
    same_BM[own_B, own_B] = False
    logits_BM = logits_BM.masked_fill(same_BM, float("-inf"))
    return (F.cross_entropy(logits_BM, own_B) + F.cross_entropy(logits_BM[:, :count].T, own_B)) / 2


@torch.no_grad()
def pairwise_accuracy(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures_BCHW: Tensor, scenes: list[Scene], seed: int
) -> dict[str, float]:
    """Share of pictures whose caption scores above a wrong one: of another scene (``random``), and by attribute."""
    rng = np.random.default_rng(seed)
    image = F.normalize(model.get_image_features(pixel_values=normalize(pictures_BCHW)).pooler_output, dim=-1)

    def scores(captions: list[str]) -> Tensor:
        text = model.get_text_features(input_ids=tokenize(tokenizer, captions)).pooler_output
        return (image * F.normalize(text, dim=-1)).sum(-1)

    right = scores([scene.caption for scene in scenes])
    misses = [near_misses(scene, rng) for scene in scenes]
    wrong = {kind: [miss[kind].caption for miss in misses] for kind in misses[0]}
    shifted = [scenes[(k + 1 + int(rng.integers(len(scenes) - 1))) % len(scenes)].caption for k in range(len(scenes))]
    result = {"random": shifted} | wrong
    own = [scene.caption for scene in scenes]
    accuracy = {}
    for kind, captions in result.items():
        differs = torch.tensor([a != b for a, b in zip(captions, own, strict=True)])
        accuracy[kind] = float((right > scores(captions))[differs].float().mean())
    return accuracy
