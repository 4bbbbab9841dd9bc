"""Workers without torch and Megatron: the ids of Megatron's own wrappers, in little memory."""

import argparse
import base64
import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from megatron_default_moe.data import tokenizers
from megatron_default_moe.data.corpus import train_tokenizer
from megatron_default_moe.data.preprocess import add_arguments, preprocess
from megatron_default_moe.text import encoder, recipes, tokenizer_flags, workers

TEXTS = [
    "def f(x):\n    return x\n",
    "  two  spaces,\ttabs \n\n\n and 1,234.5 caf\u00e9s \u6f22\u5b57 \U0001f600 \u0301",
    "</s> <s> <unk> <|endoftext|> [MASK] <SPECIAL_9> \u2581",
    " ",
    "",
    "It's the end. We\u2019ll see! CamelCaseWords HTTPServer // a/b",
]
HEAVY = ("torch", "megatron", "transformers")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a tokenizer of each kind, and the input."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "piece.model").write_bytes(train_tokenizer(TEXTS * 10, 400))
    entries = [{"rank": i, "token_bytes": bytes([i]), "token_str": ""} for i in range(256)]
    entries += [
        {"rank": 256 + i, "token_bytes": token, "token_str": ""}
        for i, token in enumerate((b"re", b"ret", b" t", b"th", b"  ", b"\n\n"))
    ]
    for entry in entries:
        entry["token_bytes"] = base64.b64encode(entry["token_bytes"]).decode()
    (folder / "tiktoken.json").write_text(json.dumps(entries))

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<s>", "</s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 3, trainer)
    bpe.model.save(str(folder))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(4)
    (folder / "hf").mkdir()
    bpe.save(str(folder / "hf" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder


def parsed(files: pathlib.Path, *flags: str, output: pathlib.Path | None = None):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [word.replace("FILES", str(files)) for word in flags]
    out = output or files / "nothing"
    return parser.parse_args(
        ["--input", str(files / "in.jsonl"), "--output-prefix", str(out), *words]
    )


KINDS = {
    "sentencepiece": "SentencePieceTokenizer --tokenizer-model FILES/piece.model",
    "llama2": "Llama2Tokenizer --tokenizer-model FILES/piece.model",
    "tiktoken": "TikTokenizer --tokenizer-model FILES/tiktoken.json --vocab-size 270"
    " --tiktoken-num-special-tokens 10",
    "tiktoken v1": "TikTokenizer --tokenizer-model FILES/tiktoken.json --vocab-size 270"
    " --tiktoken-num-special-tokens 10 --tiktoken-pattern v1",
    "hugging face": "HuggingFaceTokenizer --tokenizer-model FILES/hf",
    "hugging face, bare": "HuggingFaceTokenizer --tokenizer-model FILES/hf"
    " --tokenizer-hf-no-include-special-tokens",
    "hugging face, more tokens": "HuggingFaceTokenizer --tokenizer-model FILES/hf"
    " --tokenizer-special-tokens CamelCase",
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_bytes_are_those_of_megatrons_wrapper(files, tmp_path, monkeypatch, kind) -> None:
    """In files too, which must be longer than nothing."""
    flags = ["--tokenizer-type", *KINDS[kind].split(), "--append-eod"]
    recipe = recipes.direct(parsed(files, *flags))
    if recipe is None:
        # The reading process costs seconds each; one test below starts it.
        assert "hugging" in kind
        recipe = tokenizers.from_transformers(parsed(files, *flags))
    tokenizer = tokenizers.build(parsed(files, *flags))
    megatron = tokenizers.Megatron(
        parsed(files, *flags),
        tokenizers.vocabulary(tokenizer, None),
        tokenizers.end_of_document(tokenizer),
    )
    assert (recipe.vocabulary, recipe.eod) == (megatron.vocabulary, megatron.eod)
    written = []
    for name, one in (("ours", recipe), ("theirs", megatron)):
        monkeypatch.setattr(tokenizers, "recipe", lambda args, one=one: one)
        preprocess(parsed(files, *flags, output=tmp_path / name), say=lambda _: None)
        written.append(
            [(tmp_path / f"{name}_text_document{end}").read_bytes() for end in (".bin", ".idx")]
        )
    assert written[0] == written[1]
    assert len(written[0][0]) > 100


def test_the_flags_are_megatrons() -> None:
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    tokenizer_flags.add_arguments(ours)
    ArgumentGroupFactory(TokenizerConfig).build_group(theirs, "tokenizer")

    def table(parser: argparse.ArgumentParser) -> dict[str, tuple[object, ...]]:
        return {
            word: (type(one), one.dest, one.default, one.type, one.choices, one.nargs)
            for one in parser._actions
            for word in one.option_strings
        }

    assert table(ours) == table(theirs)


@dataclasses.dataclass(frozen=True)
class Spy(recipes.SentencePiece):
    """A recipe whose ids say what is imported where it is built."""

    def build(self) -> recipes.Tokenize:
        encode = super().build()

        def loaded(text: str) -> list[int]:
            assert encode(text)
            return [int(name in sys.modules) for name in HEAVY]

        return loaded


def test_a_worker_has_neither_torch_nor_megatron(files) -> None:
    import functools

    recipe = Spy.of(str(files / "piece.model"))
    make = functools.partial(encoder.Encoder, recipe, ["text"], False, None)
    lines = [json.dumps({"text": TEXTS[0]}).encode()] * 100
    found = list(workers.encoded(make, 2, lines))
    assert [number for number, _, _ in found] == list(range(1, 101))
    zeros = bytes(2 * len(HEAVY))
    assert {(reason, ids) for _, reason, [(ids, _)] in found} == {("", zeros)}


def test_the_command_stays_small(files, tmp_path) -> None:
    """The peak is VmHWM: ``ru_maxrss`` begins with that of the process that starts this one."""
    source = tmp_path / "long.jsonl"
    line = json.dumps({"text": "def f(x):\n    return x + 1\n" * 500}) + "\n"
    source.write_text(line * 300)
    code = (
        "import sys\n"
        "from megatron_default_moe.commands.line import main\n"
        "if __name__ == '__main__':\n"
        "    code = main(sys.argv[1:])\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    used = next(int(x.split()[1]) for x in lines if x.startswith('VmHWM')) // 1024\n"
        f"    print('USED', used, *(n for n in {HEAVY} if n in sys.modules))\n"
        "    sys.exit(code)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    flags = f"--tokenizer-type {KINDS['hugging face'].replace('FILES', str(files))}"
    words = f"preprocess --input {source} --output-prefix {tmp_path}/out --workers 2 {flags}"
    done = subprocess.run(
        [sys.executable, str(script), *words.split()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.split("USED ")[1].split()
    assert len(used) == 1, f"imported {used[1:]}"
    assert int(used[0]) < 200
    assert (tmp_path / "out_text_document.bin").stat().st_size > 1 << 20


def test_long_lines_are_few_at_a_time() -> None:
    """Or 32 lines of a megabyte wait four times for each worker."""
    lines = [b"x" * (1 << 20)] * 3 + [b"x"] * 40
    assert [len(chunk) for chunk in workers._chunks(lines)] == [1, 1, 1, 32, 8]
