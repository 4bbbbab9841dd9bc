"""The corpus: what is read, how it is split, and that Megatron reads what is written."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_default_moe.data import corpus
from megatron_default_moe.data.corpus import CorpusSettings, prepare_stdlib, stdlib_documents
from megatron_default_moe.errors import UserError

SETTINGS = CorpusSettings(vocab_size=320, validation_percent=20)


def make_library(root: Path, files: int = 40) -> Path:
    for i in range(files):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{i}(self):\n    return self.value + {i}\n\n\tx = 'é☃'\n")
    return root


def test_documents_leave_out_tests_and_what_is_not_utf8(tmp_path):
    for name in (
        "b.py",
        "a/z.py",
        "test/x.py",
        "a/tests/x.py",
        "idlelib/x.py",
        "_sysconfigdata_.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "latin1.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_text("\n")
    assert list(stdlib_documents(tmp_path)) == ["a/z.py", "b.py"]


def test_documents_of_this_interpreter_are_megabytes():
    documents = stdlib_documents()
    assert sum(map(len, documents.values())) > 4_000_000
    assert "argparse.py" in documents


def test_a_folder_without_sources_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no Python sources"):
        stdlib_documents(tmp_path)


def test_split_is_by_name_and_near_the_share_asked_for():
    names = [f"package/module{i}.py" for i in range(2000)]
    held_out = [name for name in names if corpus.is_validation(name, 5)]
    assert 60 < len(held_out) < 140
    assert held_out == [name for name in names if corpus.is_validation(name, 5)]


def test_tokenizer_gives_any_text_back_and_is_deterministic():
    import sentencepiece

    texts = ["def f(x):\n    return  x\n" * 20, "class A:\n\n    pass\r\n" * 20, "é" * 50]
    model = corpus.train_tokenizer(texts, 320)
    assert model == corpus.train_tokenizer(texts, 320)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.get_piece_size() == 320
    for text in [*texts, "  \t two  spaces\n\n", "never seen: ☃ ß \x00"]:
        assert processor.decode(processor.encode(text)) == text


def test_megatron_reads_what_is_written(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.tokenizers import MegatronTokenizer

    out = tmp_path / "out"
    manifest = prepare_stdlib(out, SETTINGS, root=make_library(tmp_path / "lib"))
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(out / "tokenizer.model"), metadata_path={"library": "sentencepiece"}
    )
    assert (tokenizer.eod, tokenizer.vocab_size) == (corpus.EOD_ID, 320)
    files = 0
    for part in ("train", "valid"):
        dataset = IndexedDataset(str(out / part))
        assert len(dataset) == len(dataset.document_indices) - 1 == manifest[part]["files"] > 0
        assert sum(map(len, dataset)) == manifest[part]["tokens"]
        for document in dataset:
            assert document[-1] == tokenizer.eod
            assert np.count_nonzero(document == tokenizer.eod) == 1
            assert tokenizer.detokenize(document[:-1].tolist()).startswith("def function_")
        files += len(dataset)
    assert files == 40


def test_work_already_done_is_kept_and_made_again_when_anything_changes(tmp_path):
    library, out, said = make_library(tmp_path / "lib"), tmp_path / "out", []

    def prepare(settings=SETTINGS):
        said.clear()
        manifest = prepare_stdlib(out, settings, root=library, say=said.append)
        return manifest, "up to date" in said[-1]

    first, kept = prepare()
    assert not kept
    assert prepare() == (first, True)
    assert json.loads((out / "manifest.json").read_text()) == first

    (out / "train.bin").write_bytes(b"torn")
    (out / "cache").mkdir()
    assert prepare() == (first, False)
    assert not (out / "cache").exists(), "Megatron's sample indices belong to the old files"

    (library / "package0" / "module0.py").write_text("x = 1\n")
    assert not prepare()[1]
    assert not prepare(CorpusSettings(vocab_size=330, validation_percent=20))[1]
    assert sorted(path.name for path in out.iterdir()) == sorted([*corpus.FILES, "manifest.json"])


def test_an_interrupted_run_leaves_no_manifest(tmp_path, monkeypatch):
    library, out = make_library(tmp_path / "lib"), tmp_path / "out"
    prepare_stdlib(out, SETTINGS, root=library)
    (library / "package0" / "module0.py").write_text("x = 1\n")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "write_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_stdlib(out, SETTINGS, root=library)
    assert not (out / "manifest.json").exists()
