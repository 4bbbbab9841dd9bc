"""Megatron's datasets hold every sample to the vocabulary, and are made anew for new data.

Contract: an id that the model does not have never becomes part of a batch, whatever was checked
before; the cached indices of other data at the same path are not used, those of the same data are.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from data_files import VOCABULARY, arguments, build, write

from megatron_default_moe.data import checked_dataset, gpt_data, index_files
from megatron_default_moe.errors import RankError, UserError, report


@pytest.fixture(autouse=True)
def arguments_are_global(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Megatron does before it builds data."""
    monkeypatch.setattr(checked_dataset, "get_args", lambda: arguments("--mock-data"))
    return None


def training(flags: str) -> Any:
    return build(arguments(f"{flags} --eval-iters 0"))[0]


def cached(folder: pathlib.Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.rglob("*.npy")}


@pytest.mark.parametrize("flags", ["--train-data-path {0}", "--data-path 1 {0} 1 {0} --split 1"])
def test_a_cache_does_not_outlive_its_source(tmp_path: pathlib.Path, flags: str) -> None:
    prefix = write(tmp_path / "data", [30, 20])
    flags = f"{flags.format(prefix)} --data-cache-path {tmp_path}/cache"
    old = training(flags)
    first = cached(tmp_path)
    training(flags)
    assert cached(tmp_path) == first

    write(tmp_path / "data", [30, 20, 45], first=7)
    new = training(flags)
    assert first.items() < cached(tmp_path).items()
    for dataset in (old, new):
        documents = [
            part.document_index.max() for part in getattr(dataset, "datasets", None) or [dataset]
        ]
        assert set(documents) == {1 if dataset is old else 2}


def test_the_digest_sees_each_length(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a small file any change, in a large one (here: above no bytes) what shifts the rest."""
    lengths = [[3] * 20_000, [3] * 19_999 + [4], [4, 2] + [3] * 19_998, [4] + [3] * 19_999]
    prefixes = [write(tmp_path / str(n), one) for n, one in enumerate(lengths)]
    assert len({index_files.digest(prefix) for prefix in prefixes}) == 4
    assert index_files.digest(prefixes[0]) == index_files.digest(
        write(tmp_path / "x", lengths[0], 9)
    )
    monkeypatch.setattr(index_files, "_WHOLE", 0)
    monkeypatch.setattr(index_files, "_BLOCK", 1 << 8)
    assert len({index_files.digest(prefix) for prefix in prefixes}) == 4


def spoil(prefix: str, place: int, found: int) -> None:
    """Write another id into the data, behind the checks before the first step."""
    ids = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    ids[place] = found
    ids.flush()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("flags", ["--train-data-path {0}", "--data-path 1 {0} 1 {0} --split 1"])
def test_no_sample_holds_an_id_that_the_model_does_not_have(
    tmp_path: pathlib.Path, flags: str, workers: int
) -> None:
    prefix = write(tmp_path / "data", [30, 20])
    dataset = training(f"{flags.format(prefix)} --train-iters 20")
    spoil(prefix, 25, VOCABULARY)
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=workers)
    batches, samples = iter(loader), []
    with pytest.raises(RankError) as refused:
        samples.extend(gpt_data._next(batches) for _ in itertools.count())
    assert all(sample["labels"].max() < VOCABULARY for sample in samples)
    assert str(refused.value).startswith(
        f"{prefix} holds the token id {VOCABULARY} and --tokenizer-type NullTokenizer has the ids"
        f" 0 to {VOCABULARY - 1}: give "
    )
    assert "\n" not in str(refused.value)


def test_a_negative_id_is_none_of_the_models(tmp_path: pathlib.Path) -> None:
    """Megatron takes -1 for the padding that it writes itself, and would train on id 0 there."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "data")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.arange(41, dtype=np.int32), [41])
    builder.finalize(f"{prefix}.idx")
    dataset = training(f"--train-data-path {prefix} --train-iters 20")
    ids = np.memmap(f"{prefix}.bin", dtype=np.int32, mode="r+")
    ids[20] = -1
    ids.flush()
    with pytest.raises(RankError, match="holds the token id -1 "):
        [dataset[place] for place in range(len(dataset))]
    with pytest.raises(UserError, match="holds the token id -1 "):
        training(f"--train-data-path {prefix}")


def test_mock_data_is_held_to_the_vocabulary_too() -> None:
    flags = "--mock-data --null-tokenizer-eod-id 99 --padded-vocab-size 64 --train-iters 300"
    dataset = training(flags)
    with pytest.raises(RankError, match=r"^--mock-data holds the token id 99"):
        [dataset[place] for place in range(len(dataset))]


def test_large_files_are_looked_at_in_places(tmp_path: pathlib.Path) -> None:
    prefix = write(tmp_path / "data", [1 << 20])
    index = index_files.read("--train-data-path", prefix)
    spoil(prefix, 1 << 16, VOCABULARY + 5)
    assert index.first_outside(VOCABULARY, budget=1 << 20) == VOCABULARY + 5
    assert index.first_outside(VOCABULARY, budget=1 << 18) is None
    spoil(prefix, 1 << 18, VOCABULARY + 6)
    assert index.first_outside(VOCABULARY, budget=1 << 18) == VOCABULARY + 6


def test_the_rank_that_met_it_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert report(RankError("a sentence")) == 2
    assert capsys.readouterr().err == "error: rank 3: a sentence\n"
