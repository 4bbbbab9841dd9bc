"""``default-moe preprocess``, from a checkout: a JSONL file becomes Megatron's `.bin/.idx`.

python tools/preprocess_data.py --input text.jsonl --output-prefix data/text --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model
"""

import sys

from megatron_default_moe.data.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
