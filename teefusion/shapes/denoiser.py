"""The teacher's SD3 transformer and its two text encoders, trained together by flow matching.

x = (1 - sigma) x0 + sigma noise, target noise - x0, timestep 1000 sigma (Esser et al., arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from teefusion.devices import plain_attention
from teefusion.progress import Progress
from teefusion.shapes.autoencoder import LATENT_CHANNELS
from teefusion.shapes.corpus import CONTEXT, tokenize
from teefusion.shapes.optimisation import Optimizer

SHIFT = 3.0
_TEXT_WIDTH = 64
_NULL_SHARE = 0.2
# Stock SD3 without T5 appends `max_sequence_length` zero tokens, 256 unless told otherwise. Some batches show such
# tokens, so that the model learns to pass them over and draws alike with none (fast) and with 256 (stock default).
_ZERO_TOKENS = (0, 8, 64, 256)
_ZERO_TOKEN_SHARES = (0.88, 0.06, 0.04, 0.02)


@dataclass(frozen=True)
class Denoiser:
    """What is trained together."""

    transformer: SD3Transformer2DModel
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]

    def parameters(self) -> list[nn.Parameter]:
        """Of all three."""
        return [p for module in (self.transformer, *self.text_encoders) for p in module.parameters()]

    def encode(self, ids_BT: Tensor, zero_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens [B, T + zero_tokens, E] and pooled text [B, P], as StableDiffusion3Pipeline makes them."""
        outputs = [encoder(ids_BT, output_hidden_states=True) for encoder in self.text_encoders]
        tokens_BTE = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        if zero_tokens:
            tokens_BTE = torch.cat([tokens_BTE, tokens_BTE.new_zeros(len(ids_BT), zero_tokens, 2 * _TEXT_WIDTH)], dim=1)
        return tokens_BTE, torch.cat([output.text_embeds for output in outputs], dim=-1)


def make_denoiser(tokenizer: CLIPTokenizer, *, layers: int, width: int, seed: int) -> Denoiser:
    """Random weights; the text encoders differ by their seeds."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    _close_gates(transformer)
    return Denoiser(transformer, (_text_encoder(tokenizer), _text_encoder(tokenizer)))


def _close_gates(transformer: SD3Transformer2DModel) -> None:
    """Zero the modulations and the last layer, so that every block starts as identity (DiT, arXiv 2212.09748)."""
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for layer in modulations:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_denoiser(
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    latents_NCHW: Tensor,
    captions: list[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    export_every: int = 0,
    export: Callable[[int], None] | None = None,
) -> None:
    """Train in place; at the end (and at exports) the weights are their moving average."""
    generator = torch.Generator().manual_seed(seed)
    ids_NT, null_T = tokenize(tokenizer, captions), tokenize(tokenizer, [""])[0]
    optimizer = Optimizer(model.parameters(), learning_rate=learning_rate, steps=steps, weight_decay=0.01)
    ema = EMAModel(model.parameters(), decay=0.999)
    losses: list[float] = []
    with plain_attention(), Progress("denoiser", total=steps, unit="step") as progress:
        for step in range(1, steps + 1):
            index = torch.randint(len(captions), (batch_size,), generator=generator)
            dropped = torch.rand(batch_size, generator=generator) < _NULL_SHARE
            ids = torch.where(dropped[:, None], null_T, ids_NT[index])
            loss = _loss(model, latents_NCHW[index], ids, generator)
            optimizer.step(loss)
            ema.step(model.parameters())
            losses.append(loss.item())
            progress.advance(1, note=f"loss {sum(losses[-100:]) / len(losses[-100:]):.4f}")
            if export and export_every and step % export_every == 0 and step < steps:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                export(step)
                ema.restore(model.parameters())
    ema.copy_to(model.parameters())


def _loss(model: Denoiser, x0_BCHW: Tensor, ids_BT: Tensor, generator: torch.Generator) -> Tensor:
    count = len(x0_BCHW)
    level_B = torch.sigmoid(torch.randn(count, generator=generator))  # logit-normal
    sigma_B = SHIFT * level_B / (1 + (SHIFT - 1) * level_B)
    noise = torch.randn(x0_BCHW.shape, generator=generator)
    sigma = sigma_B.view(-1, 1, 1, 1)
    choice = int(torch.multinomial(torch.tensor(_ZERO_TOKEN_SHARES), 1, generator=generator))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, pooled = model.encode(ids_BT, _ZERO_TOKENS[choice])
        predicted = model.transformer(
            hidden_states=(1 - sigma) * x0_BCHW + sigma * noise,
            timestep=sigma_B * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return F.mse_loss(predicted.float(), noise - x0_BCHW)
