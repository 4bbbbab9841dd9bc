"""The command line ``default-moe``: a table of commands, and what finds and runs one."""
