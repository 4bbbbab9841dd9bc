"""What is checked of a run's data before its first step.

Contract: whatever few documents there are, and however they are divided, a run gets all the samples
that it will take from every part that it reads, or one sentence, within seconds.
"""

import dataclasses
import json
import pathlib
import re
import time
from typing import Any

import pytest
from data_files import VOCABULARY, arguments, build, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_default_moe import UserError
from megatron_default_moe.data import tokenizers

SECONDS = 5
LENGTH = 8


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Files: none, one short and a few documents; half of a pair; text."""
    write(tmp_path / "few", [20, 3, 40, 9])
    write(tmp_path / "one", [5])
    write(tmp_path / "foreign", [20, 20])
    write(tmp_path / "half", [30])
    write(tmp_path / "cut", [15, 15])
    write(tmp_path / "long_text_document", [30])
    (tmp_path / "half.idx").unlink()
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-1])
    (tmp_path / "headless.idx").write_bytes(b"MMIDIDX")
    (tmp_path / "headless.bin").write_bytes(b"")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    content = bytearray((tmp_path / "foreign.bin").read_bytes())
    content[-2:] = (VOCABULARY).to_bytes(2, "little")
    (tmp_path / "foreign.bin").write_bytes(content)
    (tmp_path / "blend.txt").write_text(f"0.5 {tmp_path}/few 0.5 {tmp_path}/one")
    return tmp_path


def refusal(folder: pathlib.Path, flags: str) -> str:
    with pytest.raises(UserError) as refused:
        build(arguments(flags.replace("@", f"{folder}/")))
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(f"{folder}/", "@")


PREFIXES = {
    "@none": "@none names no data: there is no none.idx and no none.bin",
    "@long": "; did you mean @long_text_document?",
    "@half": "@half has no half.idx",
    "@cut": "@cut is cut short: cut.bin has 59 bytes of the 60 that",
    "@headless": "headless.idx is no index of Megatron's",
    "@text.jsonl": "@text.jsonl is a file of its own, not the prefix",
    "@few.bin": "takes a prefix: leave .bin away",
    "@foreign": f"@foreign holds the token id {VOCABULARY} and --tokenizer-type NullTokenizer has"
    f" the ids 0 to {VOCABULARY - 1}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "flags",
    [
        "--train-data-path {0} --eval-iters 0",
        "--train-data-path @few --valid-data-path @few {0} @few",
        "--data-path 0.5 @few 0.5 {0} --split 50,50",
        "--skip-train --valid-data-path {0}",
    ],
)
def test_a_prefix_that_cannot_be_read(folder: pathlib.Path, flags: str, prefix: str) -> None:
    assert PREFIXES[prefix] in refusal(folder, flags.format(prefix))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "no data is named"),
        ("--mock-data --data-path @few", "--data-path and --mock-data both name data"),
        ("--data-path @few --data-args-path @blend.txt", "both name data"),
        ("--data-path @few --train-data-path @few", "both name data"),
        ("--data-path", "--data-path names no prefix"),
        ("--valid-data-path @few", "--valid-data-path alone leaves nothing to train on"),
        ("--train-data-path @few --split 9,1", "leave --split out"),
        ("--data-args-path @blend.txt", "needs --split"),
        ("--data-args-path @nowhere --split 1", "the file cannot be read"),
        ("--per-split-data-args-path @blend.txt", "not JSON"),
        ("--data-path 0 @few 1 @few --split 50,50", "the weight 0: a weight must be above 0"),
        ("--data-path -1 @few 1 @few --split 50,50", "must be above 0"),
        ("--data-path nan @few 1 @few --split 50,50", "must be above 0"),
        ("--data-path 1 @few @few @few --split 50,50", "where the weight of @few should be"),
        ("--data-path @few --split 0,0,0", "--split 0,0,0 must be up to three shares"),
        ("--data-path @few --split 9,1,0,0", "must be up to three shares"),
        ("--data-path @few --split all", "must be up to three shares"),
        ("--train-data-path @few", "--eval-iters 1 evaluates and there is no validation data"),
        ("--data-path @few --split 100,0,0", "give --split a second share (it is 100,0,0)"),
        ("--skip-train --test-data-path @few", "there is no validation data"),
        ("--skip-train --valid-data-path @few --eval-iters 0", "does nothing"),
        ("--data-path @few", "of the 4 sequences of --data-path @few none is left for the"),
        ("--data-path @few --split 0,1 --eval-iters 1", "nothing to train on"),
        ("--train-data-path @few @one @few --eval-iters 0", "@one has 5 tokens"),
        ("--train-data-path @few @few @few --eval-iters 0 --train-iters 99", "yields 24 samples"),
        ("--train-data-path @one --eval-iters 0 --train-iters 9999999", "would read 3"),
        ("--train-data-path @few --eval-iters 0 --vocab-size 40", "holds the token id 62"),
        (
            "--train-data-path @few --eval-iters 0 --tokenizer-type TikTokenizer",
            "--tokenizer-type TikTokenizer: ",
        ),
    ],
)
def test_what_a_run_cannot_take(folder: pathlib.Path, flags: str, words: str) -> None:
    assert words in refusal(folder, flags)


SETS = "--train-data-path @few --valid-data-path @few --full-validation"
ONE_BY_ONE = f"{SETS} --multiple-validation-sets --eval-micro-batch-size 1"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (SETS, "add --multiple-validation-sets"),
        (f"{SETS} --multiple-validation-sets --eval-micro-batch-size 2", "one sequence at a time"),
        (f"{ONE_BY_ONE} --test-data-path @few", "when there is a test set"),
        ("--mock-data --full-validation --multiple-validation-sets", "when there is a test set"),
        (f"{ONE_BY_ONE} --pipeline-model-parallel-size 4", "in the middle of a pipeline"),
        (f"{ONE_BY_ONE} --validation-set-names a b", "names 2 sets and there are 1"),
        (f"{ONE_BY_ONE} --valid-data-path @one", "yields 0 samples"),
        (f"{ONE_BY_ONE} --valid-data-path 1 @few 2 @few", "--valid-data-path has weights"),
        (f"{ONE_BY_ONE.replace('--full-validation', '')}", "works with --full-validation alone"),
    ],
)
def test_validation_that_this_megatron_cannot_do(
    folder: pathlib.Path, flags: str, words: str
) -> None:
    assert words in refusal(folder, flags)


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ("--train-data-path @few --eval-iters 0", "train"),
        ("--train-data-path @one --valid-data-path @one", "train valid"),
        ("--data-path @few --eval-iters 0", "train"),
        ("--data-path @few @few @few --eval-iters 0 --split 2,1,1 --train-iters 3", "train"),
        ("--data-path @few --split 60,40,0", "train valid"),
        ("--data-path @few --split 50,49,1", "train valid"),
        ("--data-path @few --split 50,25,25", "train valid test"),
        ("--data-path 2 @few 1 @few --split 50,25,25", "train valid test"),
        ("--data-args-path @blend.txt --split 1 --eval-iters 0", "train"),
        ("--skip-train --valid-data-path @few", "valid"),
        ("--skip-train --data-path @few --split 1,1,2", "valid test"),
        (ONE_BY_ONE, "train valid"),
        ("--mock-data", "train valid test"),
        ("--mock-data --eval-iters 0", "train"),
    ],
)
def test_what_a_run_can_take(folder: pathlib.Path, flags: str, there: str) -> None:
    built = build(arguments(flags.replace("@", f"{folder}/")))
    names = [name for name, part in zip(("train", "valid", "test"), built, strict=True) if part]
    assert names == there.split()
    for part in built:
        if part is not None:
            assert part[0]["tokens"].shape == (LENGTH,)


def test_a_file_with_the_parts(folder: pathlib.Path) -> None:
    file = folder / "parts.json"
    few = str(folder / "few")
    file.write_text(json.dumps({"train": f"1 {few} 2 {few}", "valid": [few], "test": None}))
    train, valid, test = build(arguments(f"--per-split-data-args-path {file}"))
    assert len(train) >= 10
    assert len(valid) >= 6
    assert test is None
    for text, words in (
        ("{}", "must hold train"),
        ('{"train": 1, "valid": null, "test": 2}', "ist"),
    ):
        file.write_text(text)
        assert words in refusal(folder, "--per-split-data-args-path @parts.json")


@dataclasses.dataclass
class Tokenizer:
    vocab_size: int
    eod: Any = None


@pytest.mark.parametrize(
    ("tokenizer", "padded", "size"),
    [
        (Tokenizer(63, 62), 64, 63),
        (Tokenizer(63, 63), 128, 64),
        (Tokenizer(63, -1), None, 63),
        (Tokenizer(200, 199), 128, 128),
    ],
)
def test_the_vocabulary_is_the_tokenizers(
    tokenizer: Tokenizer, padded: int | None, size: int
) -> None:
    assert tokenizers.vocabulary(tokenizer, padded) == size


# -- Any few documents ----------------------------------------------------------------------------

CORPUS = st.lists(st.integers(0, 3 * LENGTH), max_size=5)
SPLITS = ("1,0,0", "100,0,0", "99,1,0", "1,1,0", "5,3,2", "969,30,1", "0,1,0", "2,1,1")


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[list[int]], str]:
    """Corpora, and flags in which @0, @1, ... are their prefixes."""
    corpora = draw(st.lists(CORPUS, min_size=1, max_size=3))

    def blend() -> str:
        few = draw(st.lists(st.integers(0, len(corpora) - 1), min_size=1, max_size=3))
        weights = draw(st.booleans())
        return " ".join(f"{draw(st.integers(1, 9))} @{n}" if weights else f"@{n}" for n in few)

    flags = [f"--eval-iters {draw(st.integers(0, 2))} --train-iters {draw(st.integers(1, 20))}"]
    if draw(st.booleans()):
        flags.append(f"--data-path {blend()} --split {draw(st.sampled_from(SPLITS))}")
    else:
        flags += [
            f"--{part}-data-path {blend()}"
            for part in ("train", "valid", "test")
            if part == "train" or draw(st.booleans())
        ]
    if draw(st.booleans()):
        flags.append("--full-validation --multiple-validation-sets --eval-micro-batch-size 1")
    if draw(st.booleans()):
        flags.append("--skip-train")
    return corpora, " ".join(flags)


@given(run=runs())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_few_documents_train_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, run: tuple[list[list[int]], str]
) -> None:
    corpora, flags = run
    folder = tmp_path_factory.mktemp("data")
    for number, lengths in enumerate(corpora):
        if sum(lengths):
            write(folder / str(number), lengths)
        else:
            (folder / f"{number}.bin").touch()
            (folder / f"{number}.idx").write_bytes(EMPTY)
    started = time.monotonic()
    try:
        args = arguments(re.sub("@", f"{folder}/", flags))
        built = build(args)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        once = args.eval_iters * args.eval_global_batch_size
        train, valid, test = built
        assert (train is None) == args.skip_train
        if train is not None:
            assert_yields(train, args.train_iters * args.global_batch_size)
        assert valid is not None or not (args.full_validation or once)
        points = 1 if args.skip_train else args.train_iters // args.eval_interval + 1
        for one in valid if isinstance(valid, list) else [valid]:
            if one is not None:
                assert_yields(one, 1 if args.full_validation else points * once)
        if test is not None:
            assert_yields(test, once)
    assert time.monotonic() - started < SECONDS


EMPTY = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + bytes(8) + b"\x01" + bytes(15)
"""An index without a sequence, as Megatron writes it."""


def assert_yields(dataset: Any, samples: int) -> None:
    assert len(dataset) >= samples > 0
    for place in (0, samples - 1):
        assert dataset[place]["tokens"].shape == (LENGTH,)
        assert dataset[place]["labels"].max() < VOCABULARY
