"""What happens around Megatron's training loop: model, entry, patches, metrics, restarts."""
