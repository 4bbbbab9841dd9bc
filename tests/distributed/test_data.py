"""Data of a run on real ranks: a foreign id on one rank ends them all, evaluation gets its batches.

Contract: a token id that the model does not have, which one rank alone meets in its own batch, ends
the run with one sentence of that rank and exit code 2 of its process, also where the vocabulary is
divided and Megatron would mask the id away; an evaluation in micro-batches of another size works
where one tensor-parallel rank reads for all.
"""

import pathlib

import pytest
from data_files import write
from launching import TINY, torchrun

pytestmark = pytest.mark.launch

# Mock data ends its documents, which are long, in this id, and the model has 64.
FOREIGN = [*TINY, "--null-tokenizer-eod-id", "99", "--padded-vocab-size", "64"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


def test_a_foreign_id_ends_every_rank() -> None:
    flags = [*FOREIGN, "--train-iters", "5000", "--log-interval", "1000"]
    entry = ["-m", "megatron_default_moe.pretrain"]
    for layout in ([], TP2):
        done = torchrun(2, [*entry, *flags, *layout], timeout=150)
        assert done.returncode != 0
        said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert said
        for line in said:
            assert "--mock-data holds the token id 99 and --tokenizer-type NullTokenizer" in line
        assert "exitcode  : 2" in done.stdout


def test_evaluation_in_micro_batches_of_its_own(tmp_path: pathlib.Path) -> None:
    prefix = write(tmp_path / "data", [300, 200])
    own = [flag for flag in TINY if flag not in ("--mock-data", "--split", "9,1,0")]
    sizes = ["--eval-micro-batch-size", "1", "--eval-global-batch-size", "1", "--train-iters", "2"]
    data = ["--train-data-path", prefix, "--valid-data-path", prefix, prefix, prefix]
    whole = ["--full-validation", "--multiple-validation-sets"]
    flags = [*own, *sizes, *data, *whole, *TP2]
    done = torchrun(2, ["-m", "megatron_default_moe.pretrain", *flags], timeout=150)
    assert done.returncode == 0, done.stdout[-3000:]
    losses = [line for line in done.stdout.splitlines() if "validation-" in line]
    assert len(losses) == 3
    assert len({line.split("lm loss value: ")[1].split()[0] for line in losses}) == 1
