"""The `slagen` command: options, commands, progress and tables."""
