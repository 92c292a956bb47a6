"""The command line: one module per command, each with HELP, EXAMPLES, add_arguments() and run().

A command with TAKES_OVERRIDES gets `--section.key=value` arguments as `args.overrides`.
"""
