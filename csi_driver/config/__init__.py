"""The command line: commands, parser, environment, and checks between flags."""
