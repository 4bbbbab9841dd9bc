"""What becomes of Megatron's exceptions while the datasets are built."""

import errno

import pytest

from megatron_default_moe import UserError
from megatron_default_moe.data import gpt_data


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_index_files_that_cannot_be_written_name_the_flag(number: int) -> None:
    with (
        pytest.raises(UserError, match=r"^--data-cache-path: .* \(.*/data/cache"),
        gpt_data._faults_of_the_build_named(None),
    ):
        raise Exception("Failed to write dataset materials") from OSError(
            number, "no", "/data/cache"
        )


@pytest.mark.parametrize("cause", [None, FileNotFoundError(errno.ENOENT, "no", "/data/train.idx")])
def test_other_faults_of_the_data_stay_what_they_are(cause: OSError | None) -> None:
    with (
        pytest.raises(Exception, match=r"^as it was$") as raised,
        gpt_data._faults_of_the_build_named(None),
    ):
        raise Exception("as it was") from cause
    assert not isinstance(raised.value, UserError)
