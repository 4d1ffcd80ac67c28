"""The bundled teacher `shapes`: a tiny SD3 of coloured shapes, its arbiter, and how both were trained."""

from pathlib import Path

_HERE = Path(__file__).parent

TEACHER_DIR = _HERE / "teacher"
"""Diffusers folder; load with ``text_encoder_3=None, tokenizer_3=None``, as any SD3 without T5."""
SCORER_DIR = _HERE / "scorer"
"""Transformers CLIP folder that scores pictures of shapes."""
PROMPTS_FILE = _HERE / "prompts.jsonl"
"""The bundled prompt set."""
