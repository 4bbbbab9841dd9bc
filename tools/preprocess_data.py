"""Turn a JSONL file into Megatron's `.bin/.idx` training data.

python tools/preprocess_data.py --input text.jsonl --output-prefix data/text --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model
"""

import argparse
import sys

from megatron_default_moe.data.preprocess import add_arguments, preprocess
from megatron_default_moe.errors import UserError


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        preprocess(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
