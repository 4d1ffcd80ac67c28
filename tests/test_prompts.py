"""Prompt sets: what they promise, and what becomes of a damaged one."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teefusion.errors import IntegrityError, PromptError, StorageError
from teefusion.files import content_key, sha256_file
from teefusion.prompt_files import read_prompts
from teefusion.prompts import (
    Prompt,
    PromptSet,
    build_prompt_set,
    load_prompt_set,
    normalise,
    write_prompt_set,
)


def build(texts: list[str], *, heldout_fraction: float = 0.5, max_chars: int = 100) -> PromptSet:
    return build_prompt_set(map(Prompt, texts), heldout_fraction=heldout_fraction, max_chars=max_chars)


# Building ------------------------------------------------------------------------------------------------------------

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180's example; 0.7284 of the range


def test_the_digest_is_sha256_of_the_case_folded_text_and_ignores_the_style() -> None:
    assert Prompt("aBc", "ink").digest == Prompt("abc").digest == ABC
    assert len(Prompt("half a pair \ud800").digest) == 64
    assert Prompt("cafe\u0301").digest == Prompt("CAF\u00c9").digest != Prompt("cafe").digest


@pytest.mark.parametrize(("fraction", "heldout"), [(0.728, False), (0.729, True)])
def test_a_prompt_is_held_out_when_its_digest_lies_below_the_fraction(fraction: float, heldout: bool) -> None:
    prompts = build(["abc", *map(str, range(50))], heldout_fraction=fraction)
    assert (Prompt("abc") in prompts.heldout, Prompt("abc") in prompts.train) == (heldout, not heldout)


def test_texts_are_normalised_and_the_rest_is_dropped_and_counted() -> None:
    usable = [f"prompt {k}" for k in range(20)]
    others = [
        "  cafe\u0301\u00a0\n\t au  lait ",  # kept as "café au lait"
        "CAF\u00c9 au lait",  # duplicate: composed already, other case
        "STRASSE",  # kept; the next is it, case-folded
        "stra\u00dfe",
        "",
        " \u2028\x1f ",
        "a \x07 bell",
        "half a pair \ud800",
        "x" * 100,  # kept: the longest there may be
        "x" * 101,
        "  " * 500 + "y",  # kept: length counts after trimming
    ]
    prompts = build(usable + others)
    kept = {prompt.text for prompt in prompts.train + prompts.heldout}
    assert kept == {*usable, "caf\u00e9 au lait", "STRASSE", "x" * 100, "y"}
    assert prompts.dropped == {"duplicate": 2, "empty": 2, "not_text": 2, "too_long": 1}
    assert prompts.read == 31


def test_of_duplicates_the_first_stays_with_its_style() -> None:
    source = [Prompt(f"{word} {k}", style) for word, style in (("A", " ink "), ("a", "photo")) for k in range(20)]
    prompts = build_prompt_set(source, heldout_fraction=0.5, max_chars=100)
    kept = prompts.train + prompts.heldout
    assert len(kept) == 20
    assert {(prompt.text[0], prompt.style) for prompt in kept} == {("A", "ink")}


def test_a_text_that_composes_to_the_longest_length_is_kept() -> None:
    decomposed = "\u03b1\u0313\u0300\u0345" * 100  # each four compose to U+1F82
    prompts = build([decomposed, *map(str, range(20))])
    assert Prompt("\u1f82" * 100) in prompts.train + prompts.heldout
    assert prompts.dropped == {}


def test_a_long_run_of_combining_marks_takes_no_quadratic_time() -> None:
    started = time.process_time()
    assert build(["a" + "\u0301\u0323" * 40_000, *map(str, range(20))]).dropped == {"too_long": 1}
    assert time.process_time() - started < 1  # normalising it took 5 s


@pytest.mark.parametrize(
    ("texts", "fraction", "message"),
    [
        ([], 0.5, r"No usable prompt: 0 read, 0 dropped\. Give a source with at least"),
        (
            [" ", "x" * 101],
            0.5,
            r"2 read, 2 dropped \(1 empty, 1 too_long\)\. Give .* raise prompts\.max_chars \(100\)",
        ),
        (
            ["abc", "ABC"],
            0.5,
            r"No held-out prompt: 2 read, 1 dropped \(1 duplicate\), 1 for training and 0 held out, "
            r"by content hash \(prompts\.heldout_fraction 0\.5\)\. Add prompts, or raise",
        ),
        (["abc"], 0.75, r"No training prompt: 1 read, 0 dropped, 0 for training and 1 held out.* or lower"),
    ],
)
def test_an_empty_split_is_explained_with_its_arithmetic(texts: list[str], fraction: float, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        build(texts, heldout_fraction=fraction)


# With these two in every set, neither split at 0.5 is empty: ABC's digest is above, sha256("4") = 4b227777... below.
ANCHORS = ["abc", "4"]
any_text = st.text(max_size=20)


def test_normalising_composes_trims_and_collapses() -> None:
    assert normalise(" cafe\u0301\u00a0\n\tau lait\u3000") == "caf\u00e9 au lait"


@given(any_text)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == once.strip()
    assert Prompt(once).digest == Prompt(normalise(f" {text}\n")).digest


@given(st.lists(any_text), st.lists(any_text), st.floats(0.3, 0.7))
def test_adding_prompts_moves_none_to_the_other_split(texts: list[str], added: list[str], fraction: float) -> None:
    before, after = (build([*ANCHORS, *some], heldout_fraction=fraction) for some in (texts, texts + added))
    assert set(before.train) <= set(after.train)
    assert set(before.heldout) <= set(after.heldout)


@given(st.lists(any_text, unique_by=lambda text: Prompt(normalise(text)).digest), st.randoms(use_true_random=False))
def test_the_order_of_the_source_does_not_matter(texts: list[str], random: Any) -> None:
    source = list(dict.fromkeys([*ANCHORS, *texts]))
    source = [text for text in source if text in ANCHORS or normalise(text).casefold() not in ANCHORS]
    shuffled = random.sample(source, len(source))
    assert build(shuffled) == build(source)
    assert build(shuffled).sha256 == build(source).sha256


@given(st.lists(any_text))
def test_every_prompt_is_kept_once_or_counted(texts: list[str]) -> None:
    prompts = build([*ANCHORS, *texts])
    digests = [[prompt.digest for prompt in split] for split in (prompts.train, prompts.heldout)]
    assert [sorted(set(split)) for split in digests] == digests
    assert not set(digests[0]) & set(digests[1])
    assert len(digests[0]) + len(digests[1]) + sum(prompts.dropped.values()) == prompts.read == len(texts) + 2


def test_the_name_of_a_set_covers_texts_styles_and_split_but_not_what_was_dropped() -> None:
    one, two = Prompt("abc"), Prompt("4")
    sets = [
        PromptSet((one,), (two,), {}, 2),
        PromptSet((one,), (two,), {"empty": 1}, 3),
        PromptSet((two,), (one,), {}, 2),
        PromptSet((one, two), (), {}, 2),
        PromptSet((Prompt("ABC"),), (two,), {}, 2),
        PromptSet((Prompt("abc", "ink"),), (two,), {}, 2),
    ]
    assert sets[0].sha256 == sets[1].sha256
    assert len({prompts.sha256 for prompts in sets}) == 5


# Storing -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A stored set with every kind of count, and texts that need escaping."""
    texts = [*ANCHORS, "4", "", 'a "star"', "caf\u00e9 \u2603", "x" * 101, "\x07"]
    write_prompt_set(tmp_path / "set", build(texts))
    return tmp_path / "set"


def test_a_set_survives_storing(stored: Path) -> None:
    texts = [*ANCHORS, "4", "", 'a "star"', "caf\u00e9 \u2603", "x" * 101, "\x07"]
    loaded = load_prompt_set(stored)
    assert loaded == build(texts)
    assert loaded.sha256 == build(texts).sha256
    assert json.loads((stored / "manifest.json").read_text())["prompt_set"] == loaded.sha256
    assert sorted(path.name for path in stored.iterdir()) == ["heldout.jsonl", "manifest.json", "train.jsonl"]


def test_a_stored_split_is_a_source_again(stored: Path) -> None:
    assert tuple(read_prompts(stored / "train.jsonl")) == load_prompt_set(stored).train


def test_equal_sets_are_stored_in_equal_bytes(stored: Path, tmp_path: Path) -> None:
    write_prompt_set(tmp_path / "again", load_prompt_set(stored))
    for path in stored.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl", "manifest.json"])
def test_any_flipped_bit_is_refused(stored: Path, name: str) -> None:
    path = stored / name
    data = path.read_bytes()
    advice = rf"{name} is not what 'teefusion ingest' wrote.*Delete .*set and run 'teefusion ingest' again"
    for position in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            with pytest.raises(IntegrityError, match=advice):
                load_prompt_set(stored)
    path.write_bytes(data)
    load_prompt_set(stored)


def forge_split(folder: Path, data: bytes) -> None:
    """A training split of other bytes, under digests that fit them."""
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "train.jsonl").write_bytes(data)
    train = values["train"] | {"sha256": sha256_file(folder / "train.jsonl")}
    digest = content_key([train["sha256"], values["heldout"]["sha256"]], length=64)
    edit_manifest(folder, train=train, prompt_set=digest)


def edit_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"no finished prompt set: manifest\.json is missing"),
        (lambda folder: (folder / "heldout.jsonl").unlink(), r"heldout\.jsonl .*: it is missing\. Delete"),
        (lambda folder: os.truncate(folder / "train.jsonl", 5), r"train\.jsonl .*: sha256 is"),
        (
            lambda folder: edit_manifest(folder, schema_version=2),
            r"has schema version 2, this program reads 1\. Delete",
        ),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"has schema version None"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"not valid JSON\. Delete"),
        (lambda folder: edit_manifest(folder, train={"sha256": "0"}), r"train\.prompts: Field required"),
        (lambda folder: edit_manifest(folder, read=9), r"do not add up"),
        (lambda folder: edit_manifest(folder, prompt_set="0" * 64), r"prompt_set is not the digest"),
        (lambda folder: forge_split(folder, b"[]\n"), r"train\.jsonl .*: a line is no prompt"),
        (lambda folder: forge_split(folder, b""), r"train\.jsonl .*: it holds 0 prompts, the manifest says"),
    ],
)
def test_a_damaged_set_is_refused(stored: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(stored)
    with pytest.raises(IntegrityError, match=message):
        load_prompt_set(stored)


@pytest.mark.parametrize("finished", range(3))
def test_a_full_disk_leaves_no_set_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    replace, calls = os.replace, []

    def fill_up(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) > finished:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fill_up)
    with pytest.raises(StorageError, match="no space left"):
        write_prompt_set(tmp_path, build(ANCHORS))
    with pytest.raises(IntegrityError, match="no finished prompt set"):
        load_prompt_set(tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    write_prompt_set(tmp_path, build(ANCHORS))
    assert load_prompt_set(tmp_path) == build(ANCHORS)


def test_a_source_that_changes_under_the_run_is_refused(make_settings: Callable[..., Any]) -> None:
    from teefusion.stages.ingest import ingest

    settings = make_settings()
    source = Path(settings.prompts.source)
    before = source.read_bytes()
    source.write_bytes(before + b'{"prompt": "one more", "style": "photo"}\n')
    with pytest.raises(PromptError, match=r"has changed since this run began .*Restore it, or start a new run"):
        ingest(settings)
    source.write_bytes(before)
    assert ingest(settings).details["read"] == 60
