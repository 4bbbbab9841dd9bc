"""JSONL to `.bin/.idx`: the same ids as the tokenizer gives, and mistakes named in a sentence."""

import argparse
import json

import pytest

from megatron_default_moe.data.corpus import EOD_ID, train_tokenizer
from megatron_default_moe.data.preprocess import add_arguments, preprocess
from megatron_default_moe.errors import UserError

TEXTS = ["def f(x):\n    return x\n", "import os", "class A:\n    pass"]


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS * 10, 300))
    return path


def run(tmp_path, tokenizer_model, lines, *flags, say=lambda _: None):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    prefix = tmp_path / "out" / "data"
    paths = ["--input", str(source), "--output-prefix", str(prefix)]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer"]
    tokenizer += ["--tokenizer-model", str(tokenizer_model)]
    return preprocess(parser.parse_args([*paths, *tokenizer, *flags]), say=say)


def read(tmp_path, name):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [item.tolist() for item in IndexedDataset(str(tmp_path / "out" / name))]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_documents_are_the_tokenizers_ids_in_order(tmp_path, tokenizer_model, workers):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    lines = [json.dumps({"text": text, "other": text[:5]}) for text in [*TEXTS, ""]]
    flags = ["--append-eod", "--json-keys", "text", "other", "--workers", str(workers)]
    written = run(tmp_path, tokenizer_model, [*lines, " "], *flags)
    documents = read(tmp_path, "data_text_document")
    assert documents == [[*processor.encode(text), EOD_ID] for text in TEXTS]
    assert read(tmp_path, "data_other_document")[1] == [*processor.encode("impor"), EOD_ID]
    assert written["text"] == sum(map(len, documents))


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        (['{"text": "a"}', "no json"], ["--strict"], "line 2: not JSON"),
        (['{"body": "a"}'], [], "gives no token .*1 bad lines, the first is line 1"),
        ([""], [], "gives no token for data_text_document: nothing is written"),
        (['{"text": ""}'], ["--keep-empty"], "gives no token"),
        (['{"text": "a"}'], ["--tokenizer-model", "/nowhere"], "SentencePieceTokenizer: "),
        (['{"text": "a"}'], ["--input", "/nowhere"], "--input /nowhere is not a file"),
        (['{"text": "a"}'], ["--workers", "0"], "--workers"),
        (['{"text": "a"}'], ["--json-keys", "text", "text"], "names a key twice"),
        (['{"text": "1"}'], ["--tokenizer-type", "NullTokenizer"], "needs --vocab-size N"),
        (['{"text": "a"}'], ["--split-sentences", "--lang", "klingon"], "punkt data"),
        (['{"text": "a"}'], ["--output-prefix", "/dev/null/x"], "--output-prefix /dev/null/x: "),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, tokenizer_model, lines, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, tokenizer_model, lines, *flags)
    assert not list((tmp_path / "out").glob("*"))


BAD = {
    "no json": "not JSON",
    '{"body": "a"}': "no text under the key 'text'",
    "[1]": "no text under the key",
    '{"text": "a \\ud800"}': r"half a character (\ud800 alone)",
    '{"text": "a \xff"}': "not UTF-8 (byte 13 of the line)",
    "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_bad_lines_are_named_and_left_out(tmp_path, tokenizer_model, workers):
    lines = [b"\xef\xbb\xbf" + json.dumps({"text": TEXTS[0]}).encode()]
    lines += [line.encode("latin-1") for line in BAD]
    lines += [json.dumps({"text": TEXTS[1]}).encode()]
    said = []
    flags = ["--workers", str(workers)]
    written = run(tmp_path, tokenizer_model, lines, *flags, say=said.append)
    documents = read(tmp_path, "data_text_document")
    assert len(documents) == 2
    assert written["text"] == sum(map(len, documents))
    for number, (text, reason) in enumerate(zip(said, BAD.values(), strict=False), 2):
        assert f"line {number}: " in text
        assert reason in text
    assert said[-1].startswith(f"{len(BAD)} bad lines")


def test_ids_that_the_tokenizer_does_not_have_are_bad_lines(tmp_path, tokenizer_model):
    """As two bytes 65537 would be the token 1."""
    said = []
    lines = ['{"text": "1 2"}', '{"text": "65537"}', '{"text": "one"}', '{"text": "-1"}']
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--append-eod"]
    run(tmp_path, tokenizer_model, lines, *flags, say=said.append)
    assert read(tmp_path, "data_text_document") == [[1, 2, 99]]
    assert "line 2: token id 65537 is not among" in said[0]
    assert "line 3: the tokenizer refuses it" in said[1]
    assert "line 4: token id -1 is not among" in said[2]


def test_a_tokenizer_without_an_end_cannot_append_it(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 10),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        eos_id=-1,
        bos_id=-1,
        minloglevel=2,
    )
    path = tmp_path / "no_end.model"
    path.write_bytes(model.getvalue())
    lines = [json.dumps({"text": text}) for text in TEXTS]
    with pytest.raises(UserError, match="--append-eod: the tokenizer of"):
        run(tmp_path, path, lines, "--append-eod")
    assert run(tmp_path, path, lines)["text"]


def test_what_is_there_is_replaced_only_when_asked_and_whole(tmp_path, tokenizer_model):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    run(tmp_path, tokenizer_model, lines)
    before = (tmp_path / "out" / "data_text_document.bin").read_bytes()
    with pytest.raises(UserError, match=r"_text_document.bin is there; .* --overwrite"):
        run(tmp_path, tokenizer_model, lines)
    # What fails half-way leaves the old files, and nothing beside them.
    with pytest.raises(UserError, match="line 3: not JSON"):
        run(tmp_path, tokenizer_model, [*lines[:2], "no"], "--overwrite", "--strict")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"data_text_document.bin", "data_text_document.idx"}
    assert (tmp_path / "out" / "data_text_document.bin").read_bytes() == before
    run(tmp_path, tokenizer_model, lines[:1], "--overwrite")
    assert len(read(tmp_path, "data_text_document")) == 1


@pytest.mark.parametrize("vocabulary", [300, 65499, 65500])
def test_the_bytes_are_megatrons(tmp_path, vocabulary):
    """Documents of several sequences, and an empty one."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_default_moe.data.index_writer import IndexWriter
    from megatron_default_moe.text.ids import dtype_of

    dtype = DType.optimal_dtype(vocabulary)
    assert np.dtype(dtype_of(vocabulary)) == dtype
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    ours = IndexWriter(tmp_path / "ours", dtype_of(vocabulary))
    for ids, lengths in (([1, 2, 3], [2, 1]), ([], []), ([vocabulary - 1], [1])):
        theirs.add_document(np.array(ids, dtype), lengths)
        ours.add(np.array(ids, dtype).tobytes(), lengths)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    ours.finish()
    ours.publish()
    for ending in (".bin", ".idx"):
        expected = (tmp_path / f"theirs{ending}").read_bytes()
        assert (tmp_path / f"ours{ending}").read_bytes() == expected


def test_plain_text_becomes_documents_and_a_bad_block_is_named(tmp_path, tokenizer_model):
    import gzip

    import sentencepiece

    source = tmp_path / "in.txt.gz"
    blocks = [TEXTS[0].strip(), "caf\xe9", TEXTS[1]]
    source.write_bytes(gzip.compress("\n\n".join(blocks).encode("latin-1")))
    said = []
    run(tmp_path, tokenizer_model, [], "--input", str(source), say=said.append)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    expected = [processor.encode(blocks[0]), processor.encode(blocks[2])]
    assert read(tmp_path, "data_text_document") == expected
    assert "in.txt.gz, block 2: " in said[0]
