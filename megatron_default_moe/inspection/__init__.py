"""What a checkpoint's routers and default vectors look like: numbers, a table, a picture."""
