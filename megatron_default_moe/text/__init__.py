"""From raw text to token ids, with neither torch nor Megatron in the process."""
