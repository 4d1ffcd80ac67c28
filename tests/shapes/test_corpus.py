import torch

from teefusion.shapes.corpus import CONTEXT, make_pool, make_tokenizer, split_scenes, tokenize
from teefusion.shapes.drawings import all_scenes


def test_every_caption_fits_the_context_uncut() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.model_max_length == CONTEXT == 16
    assert max(len(tokenizer(scene.caption).input_ids) for scene in all_scenes()) <= 14


def test_words_of_captions_are_single_tokens() -> None:
    assert make_tokenizer().tokenize("concept art of a purple moon on an orange background") == [
        f"{word}</w>" for word in ["concept", "art", "of", "a", "purple", "moon", "on", "an", "orange", "background"]
    ]


def test_any_text_has_tokens() -> None:
    tokenizer = make_tokenizer()
    ids = tokenize(tokenizer, ["Zebra, naïve 東京 🙂!", ""])
    assert ids.shape == (2, CONTEXT)
    assert tokenizer.decode(tokenizer("zebra 東京").input_ids, skip_special_tokens=True) == "zebra 東京"
    # Start, then nothing but the end token: what guidance takes as the empty prompt.
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (CONTEXT - 1)


def test_tokenizers_of_two_calls_are_the_same() -> None:
    assert make_tokenizer().get_vocab() == make_tokenizer().get_vocab()


def test_heldout_scenes_are_kept_apart() -> None:
    train, heldout = split_scenes()
    assert len(heldout) == 231
    assert not set(train) & set(heldout)
    assert {*train, *heldout} == set(all_scenes())


def test_a_pools_pictures_do_not_depend_on_its_size() -> None:
    train, _ = split_scenes()
    small, large = make_pool(train, 3, seed=5), make_pool(train, 6, seed=5)
    assert small.scenes == tuple(train[:3])
    assert torch.equal(small.pixels_NCHW, large.pixels_NCHW[:3])
    assert not torch.equal(small.pixels_NCHW, make_pool(train, 3, seed=6).pixels_NCHW)
    pictures = small.pictures(torch.tensor([2, 0]))
    assert pictures.shape == (2, 3, 64, 64)
    assert -1 <= pictures.min() < pictures.max() <= 1
