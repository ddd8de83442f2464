"""The `mapdsl` command. One module a command, each with two functions:

`add_parser(subparsers)` adds the command's parser, under the module's name; `run(arguments) -> int` does the work and
returns the exit status. Modules import argparse and `mapdsl.cli` at the top, everything else when they run, so that a
command pays for what it uses only. What the user did wrong is raised: `UsageError` (status 2), `MapError` or
`ConversionError` (status 1); `mapdsl.cli.main` shows it.
"""
