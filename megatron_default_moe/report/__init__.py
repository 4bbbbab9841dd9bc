"""What a run wrote, as tables and plots."""
