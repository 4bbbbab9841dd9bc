"""What a user chooses: options, flags, files, and what works with what."""
