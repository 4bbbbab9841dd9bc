"""Write the Python standard library as training data: tokenizer, train and validation `.bin/.idx`.

python tools/prepare_stdlib.py runs/quickstart/data
"""

import argparse
import sys
from pathlib import Path

from megatron_default_moe.data.corpus import CorpusSettings, prepare_stdlib
from megatron_default_moe.errors import UserError


def main() -> int:
    """Run the command line."""
    defaults = CorpusSettings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; work already done is kept")
    parser.add_argument(
        "--vocab-size", type=int, default=defaults.vocab_size, help="default: %(default)s"
    )
    parser.add_argument(
        "--validation-percent",
        type=int,
        default=defaults.validation_percent,
        help="share of the files held out, default: %(default)s",
    )
    args = parser.parse_args()
    settings = CorpusSettings(
        vocab_size=args.vocab_size, validation_percent=args.validation_percent
    )
    try:
        prepare_stdlib(args.folder, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
