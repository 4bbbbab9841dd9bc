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


def run(tmp_path, tokenizer_model, lines, *flags):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    prefix = tmp_path / "out" / "data"
    paths = ["--input", str(source), "--output-prefix", str(prefix)]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer"]
    tokenizer += ["--tokenizer-model", str(tokenizer_model)]
    return preprocess(parser.parse_args([*paths, *tokenizer, *flags]), say=lambda _: None)


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
        (['{"text": "a"}', "no json"], [], "line 2: not JSON"),
        (['{"body": "a"}'], [], "no text under the key 'text'"),
        (["[1]"], [], "no text under the key"),
        (['{"text": "a"}'], ["--tokenizer-model", "/nowhere"], "SentencePieceTokenizer: "),
        (['{"text": "a"}'], ["--input", "/nowhere"], "--input /nowhere is not a file"),
        (['{"text": "a"}'], ["--workers", "0"], "--workers"),
        (['{"text": "a"}'], ["--split-sentences", "--lang", "klingon"], "punkt data"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, tokenizer_model, lines, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, tokenizer_model, lines, *flags)
