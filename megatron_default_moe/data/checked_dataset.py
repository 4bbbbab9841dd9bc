"""Megatron's GPT datasets, which refuse foreign token ids and know their source again.

Both through methods that the datasets call on themselves. What Megatron does otherwise: it looks up
any id, which is an IndexError on one rank or, with a divided vocabulary, masked away; and it names
its cached indices after the path alone, so that they outlive the data that they were made of.
"""

import dataclasses
import hashlib
import json
from typing import Any

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training import get_args

from megatron_default_moe.data import checks, index_files
from megatron_default_moe.errors import RankError
from megatron_default_moe.text.ids import outside


@dataclasses.dataclass
class CheckedConfig(GPTDatasetConfig):
    """Megatron's configuration, and the vocabulary."""

    vocabulary: int | None = None
    """Number of token ids; every sample is held to it."""


class _KnowsItsIds:
    """Looks at the ids of each sample as they are in the file, before they become tensors."""

    config: Any
    dataset_path: str | None

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        query: Any = super()
        text, documents, lengths = query._query_document_sample_shuffle_indices(idx)
        assert self.config.vocabulary is not None
        # Behind the documents' own tokens stands Megatron's padding, which is masked.
        found = outside(text[: sum(lengths)], self.config.vocabulary)
        if found is not None:
            where = self.dataset_path or "--mock-data"
            raise RankError(checks.foreign_id(get_args(), where, found, self.config.vocabulary))
        return text, documents, lengths


class CheckedGPTDataset(_KnowsItsIds, GPTDataset):
    """Real data."""

    def _build_document_sample_shuffle_indices(self) -> Any:
        if self.dataset_path is not None and not is_object_storage_path(self.dataset_path):
            # Part of the name of the cached indices, of this dataset and of blends that hold it.
            self.unique_identifiers["index"] = index_files.digest(self.dataset_path)
            self.unique_description = json.dumps(
                self.unique_identifiers, indent=4, default=lambda obj: obj.unique_identifiers
            )
            self.unique_description_hash = hashlib.md5(
                self.unique_description.encode("utf-8"), usedforsecurity=False
            ).hexdigest()
        return super()._build_document_sample_shuffle_indices()


class CheckedMockDataset(_KnowsItsIds, MockGPTDataset):
    """``--mock-data``."""
