"""Targets as a user of diffusers would write them over StableDiffusion3Pipeline's own parts, a prompt at a time."""

from __future__ import annotations

from typing import Any


def plain_loop(pipeline: Any, settings: Any, draws: list[Any], device: str) -> list[dict[str, Any]]:
    """Kept states and velocities as a user of diffusers would write it over StableDiffusion3Pipeline's own parts.

    One prompt at a time, encoded when its turn comes with the negative one beside it; guidance in a batch of two, the
    branches as the stock pipeline has them, unconditional first. It makes as many forwards as ``targets.walk``.
    """
    import torch

    made = []
    for item in draws:
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            item.prompt,
            None,
            None,
            negative_prompt="",
            device=torch.device(device),
            max_sequence_length=settings.teacher.max_sequence_length,
        )
        branches = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        pipeline.scheduler.set_timesteps(settings.strategy.num_steps, device=device)
        latents = item.noise_CHW[None].to(device, embeds.dtype)
        rows: dict[str, Any] = {"x": [], "velocity": []}
        for i in range(settings.strategy.num_steps):
            following = plain_step(pipeline, settings.strategy.name, branches, latents, i, item.guidance)
            if i in item.steps_K:
                width = pipeline.scheduler.sigmas[i + 1] - pipeline.scheduler.sigmas[i]
                rows["x"].append(latents[0].float().cpu())
                rows["velocity"].append(((following.float() - latents.float()) / width)[0].cpu())
            latents = following
        made.append({name: torch.stack(values) for name, values in rows.items()})
    return made


def plain_step(pipeline: Any, strategy: str, branches: tuple[Any, Any], latents: Any, i: int, guidance: float) -> Any:
    """The next latents: a guided Euler step; where the strategy reflects, a step, a weak step back, and a step."""
    scheduler = pipeline.scheduler
    if strategy != "euler_cfg" and i < len(scheduler.timesteps) - 1:
        h = (scheduler.sigmas[i + 1] - scheduler.sigmas[i]).to(latents.dtype)
        there = latents + h * plain_guided(pipeline, branches, latents, scheduler.timesteps[i], guidance)
        # Z-Sampling goes back with the empty prompt, W2SD with the prompt and no guidance: one branch each.
        side = slice(0, 1) if strategy == "z_sampling" else slice(1, 2)
        weak = plain_call(pipeline, tuple(part[side] for part in branches), there, scheduler.timesteps[i + 1])
        latents = there - h * weak
    velocity = plain_guided(pipeline, branches, latents, scheduler.timesteps[i], guidance)
    return scheduler.step(velocity, scheduler.timesteps[i], latents, return_dict=False)[0]


def plain_guided(pipeline: Any, branches: tuple[Any, Any], latents: Any, timestep: Any, guidance: float) -> Any:
    """Classifier-free guidance as in the stock pipeline."""
    import torch

    without, with_text = plain_call(pipeline, branches, torch.cat([latents] * 2), timestep).chunk(2)
    return without + guidance * (with_text - without)


def plain_call(pipeline: Any, branches: tuple[Any, ...], latents: Any, timestep: Any) -> Any:
    """One call of the stock transformer."""
    return pipeline.transformer(
        hidden_states=latents,
        timestep=timestep.expand(len(latents)),
        encoder_hidden_states=branches[0],
        pooled_projections=branches[1],
        return_dict=False,
    )[0]
