"""What is checked of a checkpoint before it is loaded or written."""
