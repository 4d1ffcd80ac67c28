"""Prompt files: every format, and every way a source can be bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from teefusion import prompt_files
from teefusion.errors import PromptError, StorageError
from teefusion.prompt_files import read_prompts, source_digest
from teefusion.prompts import HPS_STYLES, Prompt

GIB = 1 << 30


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Fail if Python's memory grows by ``limit`` bytes at any moment of the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffa star\r\n\n  a moon", [("a star", "unstyled"), ("", "unstyled"), ("  a moon", "unstyled")]),
        ("A.TXT", "a star\n", [("a star", "unstyled")]),
        (
            "a.jsonl",
            '"a star"\n\n{"prompt": "a moon", "style": "ink", "seed": 3}\n{"prompt": "a box", "style": null}',
            [("a star", "unstyled"), ("a moon", "ink"), ("a box", "unstyled")],
        ),
        ("a.json", '["a star",\n {"prompt": "a moon", "style": "ink"}]', [("a star", "unstyled"), ("a moon", "ink")]),
        (
            "concept-art.json",
            '["a star", {"prompt": "a moon", "style": "ink"}]',
            [("a star", "concept-art"), ("a moon", "ink")],
        ),
        ("anime.jsonl", '"a star"\n', [("a star", "unstyled")]),
        (
            "a.csv",
            'style,prompt,seed\nink,"a star, red",1\n\n,"a\nmoon",2\n',
            [("a star, red", "ink"), ("a\nmoon", "unstyled")],
        ),
        ("b.csv", "\ufeffprompt\r\na star\r\n", [("a star", "unstyled")]),
        ("c.csv", f"prompt, style\na star,{'s' * 64}\n", [("a star", "s" * 64)]),
    ],
)
def test_text_formats_are_read_as_they_stand(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, str]]
) -> None:
    assert list(read_prompts(write(tmp_path / name, content))) == [Prompt(*pair) for pair in expected]


def test_parquet_is_read_with_missing_values_as_empty_prompts(tmp_path: Path) -> None:
    columns = {"picture": [b"1", b"2", b"3"], "style": ["ink", None, None], "prompt": ["a star", None, "a moon"]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    assert list(read_prompts(path)) == [Prompt("a star", "ink"), Prompt("", "unstyled"), Prompt("a moon", "unstyled")]


def test_parquet_string_types_all_read_alike(tmp_path: Path) -> None:
    import pyarrow

    plain = pyarrow.array(["a star", "a moon"])
    for number, column in enumerate((plain, plain.cast("large_string"), plain.dictionary_encode())):
        path = write_parquet(tmp_path / f"{number}.parquet", {"prompt": column})
        assert [prompt.text for prompt in read_prompts(path)] == ["a star", "a moon"]


def test_a_folder_of_the_hps_benchmark_gives_each_list_its_style(tmp_path: Path) -> None:
    for style in HPS_STYLES:
        write(tmp_path / f"{style}.json", json.dumps([f"{style} 1", f"{style} 2"]))
    write(tmp_path / "other.json", '["not read"]')
    expected = [Prompt(f"{style} {k}", style) for style in HPS_STYLES for k in (1, 2)]
    assert list(read_prompts(tmp_path)) == expected


def test_reading_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"a picture of a star\n" * 100_000)  # 2 MB
    with peak_below(GIB >> 12):
        assert sum(1 for _ in read_prompts(path)) == 100_000


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "json"])
@pytest.mark.parametrize("head", [b"", b"a" * 100_000])
def test_a_line_of_one_gigabyte_is_refused_in_small_memory(tmp_path: Path, suffix: str, head: bytes) -> None:
    path = write(tmp_path / f"a.{suffix}", head)
    os.truncate(path, GIB)  # sparse: takes no room
    message = "larger than 256 MiB" if suffix == "json" else r"line 1 \(from byte 0\) is longer than 64 KiB"
    with peak_below(GIB >> 10), pytest.raises(PromptError, match=message):
        list(read_prompts(path))


@pytest.mark.parametrize(("length", "fits"), [(64 << 10, True), ((64 << 10) + 1, False)])
def test_the_longest_line_is_64_kib(tmp_path: Path, length: int, fits: bool) -> None:
    path = write(tmp_path / "a.txt", b"first\n" + b"a" * (length - 1) + b"\nlast\n")
    if fits:
        assert [len(prompt.text) for prompt in read_prompts(path)] == [5, length - 1, 4]
    else:
        with pytest.raises(PromptError, match=r"line 2 \(from byte 6\) is longer than 64 KiB"):
            list(read_prompts(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty \(0 bytes\)\. Write prompts"),
        ("a.json", b"[]", r"a\.json holds no prompt"),
        ("a.jsonl", b"\n\n", r"a\.jsonl holds no prompt"),
        ("a.csv", b"prompt,style\n", r"a\.csv holds no prompt"),
        ("a.doc", b"a star", r"unknown suffix \(\.doc\)\. Use one of \.txt, \.jsonl, \.json, \.csv, \.parquet"),
        ("prompts", b"a star", r"unknown suffix \(none\)"),
        ("a.txt", b"a star\na \0 moon", r"line 2 \(byte 9\) holds a NUL byte.*Save the prompts as UTF-8"),
        ("a.txt", b"\xff\xfea\0 \0s\0t\0a\0r\0", r"line 1 \(byte 3\) holds a NUL byte.*UTF-16"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"line 1 \(byte 0\) holds byte 0x89, which is not UTF-8"),
        ("a.txt", b"a star\na caf\xe9\n", r"line 2 \(byte 12\) holds byte 0xe9, which is not UTF-8.*Save"),
        ("a.txt", b"\xef\xbb\xbfa caf\xe9", r"line 1 \(byte 8\) holds byte 0xe9"),
        ("a.jsonl", b'"a star"\n"a caf\xe9"\n', r"line 2 \(byte 15\) holds byte 0xe9"),
        ("a.csv", b'prompt\na star\n"a caf\xe9"\n', r"line 3 \(byte 20\) holds byte 0xe9"),
        ("a.json", b'["a star",\n "a caf\xe9"]', r"line 2 \(byte 18\) holds byte 0xe9"),
        ("a.jsonl", b'"a star"\n\n{"prompt": }\n', r"a\.jsonl, line 3, column 12 is not valid JSON: Expecting value"),
        ("a.jsonl", b'{"prompt":\n"a star"}', r"a\.jsonl, line 1, column 11 is not valid JSON.*one string or object a"),
        ("a.json", b'["a star",\n "a moon"\n "a box"]', r"a\.json, line 3, column 2 is not valid JSON: Expecting ','"),
        ("a.json", b'["a star", }', r"a\.json, line 1, column 12 is not valid JSON"),
        ("a.json", b"[" * 50_000, r"a\.json, from line 1 on, holds JSON that is no prompt"),
        ("a.jsonl", b'"a star"\n' + b"[" * 50_000, r"a\.jsonl, from line 2 on, holds JSON that is no prompt"),
        ("a.jsonl", b"9" * 50_000, r"a\.jsonl, from line 1 on, holds JSON that is no prompt"),
        ("a.json", b'{"prompt": "a star"}', r"a\.json holds a JSON object\. Make it a list"),
        ("a.json", b'["a star", 3]', r"a\.json, item 2: number\. Write a string, or an object"),
        ("a.json", b'["a star", ["a moon"]]', r"item 2: list\."),
        ("a.jsonl", b'"a star"\n{"text": "a moon"}', r"a\.jsonl, line 2: 'prompt' is null"),
        ("a.jsonl", b'{"prompt": true}', r"line 1: 'prompt' is boolean"),
        ("a.jsonl", b'{"prompt": "a star", "style": 3}', r"line 1: style '3' cannot be used.*at most 64 characters"),
        ("a.jsonl", b'{"prompt": "a", "style": " overall"}', r"line 1: style ' overall' cannot be used"),
        ("a.jsonl", b'{"prompt": "a", "style": "\\u0007"}', r"line 1: style '\\x07' cannot be used"),
        ("a.csv", b"prompt,style\na," + b"s" * 65, r"a\.csv, line 2: style 's{65}' cannot be used"),
        ("a.csv", b"\xef\xbb\xbf", r"a\.csv has no column 'prompt' \(its columns: none\)"),
        ("a.csv", b"text,style\na star,ink\n", r"has no column 'prompt' \(its columns: 'text', 'style'\)"),
        ("a.csv", b"prompt\na star, red\n", r"a\.csv, line 2 has 2 fields, the header 1\. Put prompts .* in quotes"),
        ("a.csv", b"prompt,style\na star\n", r"a\.csv, line 2 has 1 fields, the header 2"),
        ("a.csv", b'prompt\n"a star\n', r"a\.csv, line 2 is not valid CSV: unexpected end of data\. Check its quotes"),
        ("a.csv", b'prompt\n"' + b"a star\n" * 50_000, r"is not valid CSV: field larger than field limit"),
        ("a.parquet", b"PAR1 but no table PAR1", r"a\.parquet is not readable as parquet"),
    ],
)
def test_bad_content_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        list(read_prompts(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "a.txt", r"a\.txt does not exist\. Check"),
        (lambda path: path, r"lacks anime\.json, concept-art\.json, paintings\.json, photo\.json: .* one prompt file"),
        (
            lambda path: write(path / "photo.json", "[]").parent,
            r"lacks anime\.json, concept-art\.json, paintings\.json:",
        ),
        (lambda path: (path / "a.txt").symlink_to("a.txt") or path / "a.txt", r"Cannot read .*a\.txt: Too many levels"),
        (lambda path: os.mkfifo(path / "a.txt") or path / "a.txt", r"a\.txt is no regular file"),
        (lambda path: write(path / "a.txt", "") / "b.txt", r"Cannot read .*b\.txt: Not a directory"),
    ],
)
@pytest.mark.parametrize("use", [read_prompts, source_digest])
def test_a_path_that_cannot_be_a_source_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], Path], message: str, use: Callable[[Path], object]
) -> None:
    with pytest.raises(PromptError, match=message):
        use(make(tmp_path))


def test_a_read_that_fails_half_way_is_a_prompt_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a star\n")
    prompts = read_prompts(path)
    path.unlink()
    with pytest.raises(PromptError, match=r"Cannot read .*a\.txt: No such file"):
        list(prompts)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a star"]}, r"no column 'prompt' \(its columns: 'text'\)"),
        ({"prompt": ["a", "b"], "style": ["ink", "overall"]}, r"row 2: style 'overall' cannot be used"),
        ({"prompt": [3]}, r"row 1: 'prompt' is number"),
        ({"prompt": [b"\xff"]}, r"row 1: 'prompt' is bytes"),
    ],
)
def test_bad_parquet_tables_are_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        list(read_prompts(write_parquet(tmp_path / "a.parquet", columns)))


def test_truncated_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": ["a star"] * 100})
    write(path, path.read_bytes()[:-1])
    with pytest.raises(PromptError, match="not readable as parquet"):
        list(read_prompts(path))


def test_parquet_with_broken_content_is_refused(tmp_path: Path) -> None:
    import pyarrow

    broken = write_parquet(tmp_path / "a.parquet", {"prompt": [f"prompt {k}" for k in range(100)]})
    write(broken, b"PAR1" + b"\xff" * 200 + broken.read_bytes()[204:])
    not_utf8 = pyarrow.array([b"caf\xe9"]).cast("string", safe=False)
    for path in (broken, write_parquet(tmp_path / "b.parquet", {"prompt": not_utf8})):
        with pytest.raises(PromptError, match=r"\.parquet is not readable as parquet: .*Write it again"):
            list(read_prompts(path))


def test_a_parquet_row_group_that_would_fill_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "_MAX_ROW_GROUP_BYTES", 1 << 20)
    columns = {"prompt": [f"{k:>1000}" for k in range(2000)], "picture": [os.urandom(3000) for _ in range(2000)]}
    path = write_parquet(tmp_path / "small.parquet", columns, row_group_size=500)
    with peak_below(2 << 20):  # half a megabyte of prompts; the pictures beside them are neither counted nor read
        assert sum(1 for _ in read_prompts(path)) == 2000
    with pytest.raises(PromptError, match=r"row group 0 has 1 MiB of prompts, more than 1\. .*row_group_size"):
        list(read_prompts(write_parquet(tmp_path / "large.parquet", columns)))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PromptError, match=r"takes pyarrow, .*pip install 'teefusion\[train\]'"):
        list(read_prompts(write(tmp_path / "a.parquet", "PAR1")))


def test_importing_prompts_loads_nothing_heavy() -> None:
    code = "import sys, teefusion.prompt_files; print(sorted({'torch', 'kfp', 'pyarrow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Source digest -------------------------------------------------------------------------------------------------------


def test_the_source_digest_follows_content_and_how_it_is_read_but_not_where_it_lies(tmp_path: Path) -> None:
    data = '["a star"]'
    digest = source_digest(write(tmp_path / "a.json", data))
    assert len(digest) == 64
    assert source_digest(write(tmp_path / "b.json", data)) == digest
    different = [write(tmp_path / name, data) for name in ("a.txt", "a.jsonl", "anime.json", "photo.json")]
    different.append(write(tmp_path / "c.json", '["a moon"]'))
    assert len({digest, *map(source_digest, different)}) == 6


def test_only_a_json_list_takes_its_style_from_its_name(tmp_path: Path) -> None:
    assert source_digest(write(tmp_path / "anime.txt", "a star")) == source_digest(write(tmp_path / "b.txt", "a star"))


def test_a_source_that_cannot_be_hashed_is_a_prompt_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise StorageError(f"Cannot read {path}: permission denied.")

    monkeypatch.setattr(prompt_files, "sha256_file", refuse)
    with pytest.raises(PromptError, match=r"Cannot read .*a\.txt: permission denied\. Or give another"):
        source_digest(write(tmp_path / "a.txt", "a star"))


def test_the_digest_of_a_folder_sees_each_of_its_lists(tmp_path: Path) -> None:
    for style in HPS_STYLES:
        write(tmp_path / f"{style}.json", '["a star"]')
    digests = {source_digest(tmp_path)}
    write(tmp_path / "readme.md", "not a list")
    assert digests == {source_digest(tmp_path)}
    for style in HPS_STYLES:
        write(tmp_path / f"{style}.json", '["a moon"]')
        digests.add(source_digest(tmp_path))
    assert len(digests) == 5
