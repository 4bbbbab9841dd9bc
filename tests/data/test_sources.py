"""The same documents from every kind of file; a damaged one ends in one sentence."""

import gzip
import json
import pathlib
import sys

import pytest

from megatron_default_moe.errors import UserError
from megatron_default_moe.text import sources

TEXTS = ["def f(x):\n    return x", "caf\u00e9 \u6f22\u5b57", "last"]
JSONL = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
TXT = ("\ufeff" + "\n \n\n".join(TEXTS) + "\r\n").encode()


def texts(path: pathlib.Path, *keys: str) -> list[str]:
    with sources.lines(path, list(keys or ["text"])) as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", JSONL), ("a.txt", TXT)])
def test_documents_are_the_same_from_every_file(
    tmp_path: pathlib.Path, name: str, data: bytes
) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_bytes(data)
    half = len(data) // 2
    packed.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    assert texts(plain) == texts(packed) == TEXTS
    packed.write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(UserError, match=r"a\.\w+\.gz cannot be read to its end"):
        texts(packed)
    packed.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read to its end"):
        texts(packed)


def test_zst(tmp_path: pathlib.Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    half = len(JSONL) // 2
    frames = [zstandard.compress(part) for part in (JSONL[:half], JSONL[half:])]
    path.write_bytes(b"".join(frames))
    assert texts(path) == TEXTS
    for damaged in (JSONL, b"".join(frames)[:-5], b"".join(frames) + frames[0][:6]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read to its end"):
            texts(path)
    path = tmp_path / "long.txt.zst"
    path.write_bytes(zstandard.compress(("\n\n".join(TEXTS * 50_000)).encode(), 1))
    assert texts(path) == TEXTS * 50_000


def test_parquet(tmp_path: pathlib.Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": TEXTS}), path)
    assert texts(path) == TEXTS
    with pytest.raises(UserError, match="has no column 'body'; it has n, text"):
        texts(path, "body")
    parquet.write_table(pyarrow.table({"text": [b"bytes", None]}), path)
    assert texts(path) == [None, None]
    path.write_bytes(JSONL)
    with pytest.raises(UserError, match="cannot be read to its end"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "library"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_a_missing_library_is_one_sentence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(JSONL)
    with pytest.raises(UserError, match=f"needs {library}: pip install {library}"):
        texts(tmp_path / name)


def test_plain_text_has_one_key_and_its_blocks_are_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(TXT))
    with pytest.raises(UserError, match="plain text, which has one key"):
        texts(path, "text", "other")
    assert sources.unit(path) == "block"
    assert sources.unit(tmp_path / "a.json.gz") == "line"
