"""The command line: one module per command, each with HELP, EXAMPLES, add_arguments() and run()."""
