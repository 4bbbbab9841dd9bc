"""The quickstart's corpus: the sources of Python's standard library, as Megatron training data.

Every machine that can run this package has that text, so real training needs no download. Files are
split into train and validation as wholes, a SentencePiece tokenizer is trained on the training
part, and both parts become Megatron's `.bin/.idx` pairs, each document closed by the tokenizer's
end-of-document token. The same interpreter gives the same bytes on every machine.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_default_moe.errors import UserError

EXCLUDED_FOLDERS = frozenset(
    # Some interpreters ship no tests; `encodings` is tables of numbers, not text.
    {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "__pycache__"}
)
EOD_ID = 2
"""Id of `</s>`, which Megatron's SentencePieceTokenizer reports as its end-of-document token."""

FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model")
"""What `prepare_stdlib` writes, beside `manifest.json`."""


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What decides the bytes written, apart from the corpus itself."""

    vocab_size: int = 2048
    """Pieces of the tokenizer; a multiple of 128 is what Megatron would pad to anyway."""
    validation_percent: int = 5
    """Share of the files that become validation data."""
    version: int = 1
    """Raised when the code changes what it writes, so that older folders are made again."""


def stdlib_documents(root: Path | None = None) -> dict[str, str]:
    """Text of every standard library source file, by its path below `root`, in sorted order.

    Args:
        root: folder to read; the running interpreter's standard library by default.

    Raises:
        UserError: the folder holds no Python sources (some distributions ship only `.pyc`).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        name = path.relative_to(root)
        # _sysconfigdata* holds the build machine's paths and flags.
        if EXCLUDED_FOLDERS.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents[name.as_posix()] = text.replace("\r\n", "\n")
    if not documents:
        raise UserError(f"{root} holds no Python sources to train on; use another interpreter")
    return documents


def is_validation(name: str, percent: int) -> bool:
    """Whether the file belongs to validation: a property of its name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 100 < percent


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece model that gives every text back exactly, and return its bytes.

    Code lives by its white space: nothing is normalised, indentation may be one piece, a newline is
    a piece of its own, and bytes stand in for characters the model has no piece for.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=1,
        eos_id=EOD_ID,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_documents(
    prefix: Path, documents: Iterable[Sequence[Sequence[int]]], vocab_size: int
) -> int:
    """Write `prefix.bin` and `prefix.idx` in Megatron's indexed format.

    Args:
        prefix: path without the ending.
        documents: each one a list of items (sentences, or the whole text as one) of token ids.
        vocab_size: decides whether a token takes two bytes or four.

    Returns:
        The number of tokens written.
    """
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    tokens = 0
    for items in documents:
        lengths = [len(item) for item in items]
        flat = np.concatenate([np.asarray(item, dtype=dtype) for item in items])
        builder.add_document(flat, lengths)
        tokens += len(flat)
    builder.finalize(f"{prefix}.idx")
    return tokens


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import Megatron without its dozen warnings about optional packages.

    Meant for use inside functions: that import costs seconds, which work already done can save.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")  # "No CUDA runtime is found"
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def prepare_stdlib(
    folder: Path,
    settings: CorpusSettings | None = None,
    *,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make `folder` hold the tokenizer, the `.bin/.idx` pairs and `manifest.json`.

    A folder whose manifest names the same corpus and settings is left as it is. Files appear under
    their names only when complete, the manifest last.

    Args:
        folder: where to write.
        settings: see `CorpusSettings`.
        root: the corpus, see `stdlib_documents`.
        say: takes one line per step of the work.

    Returns:
        The manifest: settings, corpus digest, files, bytes and tokens of both parts.
    """
    settings = settings or CorpusSettings()
    documents = stdlib_documents(root)
    key = {"settings": asdict(settings), "corpus_sha256": _digest(documents)}
    manifest_path = folder / "manifest.json"
    done = _read_manifest(manifest_path)
    if all(done.get(name) == value for name, value in key.items()) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == done["bytes"].get(name)
        for name in FILES
    ):
        say(f"data: {folder} is up to date")
        return done

    folder.mkdir(parents=True, exist_ok=True)
    manifest_path.unlink(missing_ok=True)
    # Megatron names its cached sample indices after the path of the data, not after its content.
    shutil.rmtree(folder / "cache", ignore_errors=True)

    manifest = {**key, **_write_parts(folder, _split(documents, settings), settings, say)}
    for name in FILES:
        partial = name + ".partial" if name.endswith(".model") else name.replace(".", ".partial.")
        os.replace(folder / partial, folder / name)
    manifest["bytes"] = {name: (folder / name).stat().st_size for name in FILES}
    partial_manifest = folder / "manifest.json.partial"
    partial_manifest.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(partial_manifest, manifest_path)
    return manifest


def _split(documents: dict[str, str], settings: CorpusSettings) -> dict[str, list[str]]:
    """The texts of both parts."""
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for name, text in documents.items():
        held_out = is_validation(name, settings.validation_percent)
        parts["valid" if held_out else "train"].append(text)
    for part, texts in parts.items():
        if not texts:
            raise UserError(f"the corpus has too few files: none is left for {part}")
    return parts


def _write_parts(
    folder: Path,
    parts: dict[str, list[str]],
    settings: CorpusSettings,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write tokenizer and data under partial names; return what the manifest says of them."""
    say(f"data: training a tokenizer of {settings.vocab_size} pieces")
    model = train_tokenizer(parts["train"], settings.vocab_size)
    (folder / "tokenizer.model.partial").write_bytes(model)
    written: dict[str, Any] = {"eod_id": EOD_ID}
    for part, texts in parts.items():
        tokens = write_documents(
            folder / f"{part}.partial", _encode(model, texts), settings.vocab_size
        )
        written[part] = {"files": len(texts), "characters": sum(map(len, texts)), "tokens": tokens}
        say(f"data: {part}: {len(texts)} files, {tokens:,} tokens")
    return written


def _encode(model: bytes, texts: Iterable[str]) -> Iterator[list[list[int]]]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts:
        yield [[*processor.encode(text), EOD_ID]]


def _digest(documents: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in documents.items():
        data = text.encode()
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and "bytes" in manifest else {}
