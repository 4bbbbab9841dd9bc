"""`default-moe preprocess` against Megatron-LM's own tool, on the same text; the ratio of speeds.

    PYTHONPATH=. .venv/bin/python bench/preprocess.py

Text is the standard library's sources, repeated; the tokenizer is SentencePiece. The tool is not in
the wheel: its way is repeated here (one import, then a pool of forked processes that return lists
of ids, `imap` with chunks of 32, Megatron's own builder). Each time is that of a whole process,
imports included, the best of a few in turns; the files must be equal. Writes
docs/results/preprocess.md.
"""

import argparse
import json
import multiprocessing
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

from megatron_default_moe.data import corpus

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "docs/results/preprocess.md"
WORKERS = (1, 2)


class TheirEncoder:
    """`Encoder` of Megatron-LM's `tools/preprocess_data.py`, without sentences."""

    tokenizer: Any = None

    def __init__(self, args: Any) -> None:
        self.args = args

    def initializer(self) -> None:
        """Build the tokenizer in a worker."""
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        TheirEncoder.tokenizer = build_tokenizer(self.args)

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        """The ids of a line, its length in tokens and in characters."""
        ids = TheirEncoder.tokenizer.tokenize(json.loads(line)["text"])
        if ids:
            ids.append(TheirEncoder.tokenizer.eod)
        return ids, [len(ids)] if ids else [], len(line)


def theirs(words: list[str]) -> None:
    """Do what the tool does."""
    with corpus.quiet_imports():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from megatron_default_moe.data.preprocess import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(words)
    args.pad_vocab_size = False
    prefix = f"{args.output_prefix}_text_document"
    with args.input.open(encoding="utf-8") as source:
        encoder = TheirEncoder(args)
        tokenizer = build_tokenizer(args)
        context = multiprocessing.get_context("fork")
        with context.Pool(args.workers, initializer=encoder.initializer) as pool:
            dtype = DType.optimal_dtype(tokenizer.vocab_size)
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
            for ids, lengths, _ in pool.imap(encoder.encode, source, 32):
                builder.add_document(ids, lengths)
            builder.finalize(f"{prefix}.idx")


def seconds(command: list[str]) -> float:
    """Run a command in a process of its own."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def compare(
    folder: pathlib.Path, megabytes: int, rounds: int
) -> list[tuple[int, int, float, float]]:
    """Bytes of input, workers, seconds of ours and of theirs, run in turns."""
    texts = list(corpus.stdlib_documents().values())
    model = folder / "tokenizer.model"
    model.write_bytes(corpus.train_tokenizer(texts[:200], 2048))
    source = folder / "text.jsonl"
    with source.open("w") as file:
        while file.tell() < megabytes * 10**6:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    size = source.stat().st_size
    tokenizer = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {model}".split()
    rows = []
    for workers in WORKERS:
        best = {"ours": float("inf"), "theirs": float("inf")}
        for _ in range(rounds):
            for who in best:
                words = ["--input", str(source), "--output-prefix", str(folder / who)]
                words += ["--append-eod", "--workers", str(workers), *tokenizer]
                if who == "ours":
                    start = ["-m", "megatron_default_moe", "preprocess", "--overwrite"]
                else:
                    start = [__file__, "--theirs"]
                best[who] = min(best[who], seconds([sys.executable, *start, *words]))
        for end in (".bin", ".idx"):
            written = [(folder / f"{who}_text_document{end}").read_bytes() for who in best]
            assert written[0] == written[1], f"the {end} files differ"
        rows.append((size, workers, best["ours"], best["theirs"]))
        print(rows[-1], flush=True)
    return rows


def page(rows: list[Any], rounds: int) -> str:
    """The results as a page."""
    lines = [
        "# Speed of preprocessing, against Megatron-LM's own tool",
        "",
        f"Command: `python bench/preprocess.py`: whole processes, imports included, the best of"
        f" {rounds} in turns, on 2 cores that other work shared, {platform.python_implementation()}"
        f" {platform.python_version()}, megatron-core {version('megatron-core')}, sentencepiece"
        f" {version('sentencepiece')}. The text is the standard library's sources, repeated; both"
        " wrote the same bytes. The tool is not in the wheel: its way (a pool that forks after the"
        " import and returns lists, Megatron's builder) is repeated in the script.",
        "",
        "| input, MB | workers | `default-moe preprocess`, s | the tool's way, s | speed ratio |",
        "|---|---|---|---|---|",
    ]
    for size, workers, ours, other in rows:
        ratio = f"{other / ours:.2f}"
        lines.append(f"| {size / 1e6:.0f} | {workers} | {ours:.1f} | {other:.1f} | {ratio} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the comparison, or one side of it."""
    if sys.argv[1:2] == ["--theirs"]:
        theirs(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: list[Any] = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(pathlib.Path(folder), megabytes, args.rounds)
    RESULTS.write_text(page(rows, args.rounds))


if __name__ == "__main__":
    main()
