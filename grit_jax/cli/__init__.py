"""The command line: one module per command, whose `run` is a `Command`."""
