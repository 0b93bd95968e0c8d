"""The command line: what every role can be told, by flag or environment, checked before anything starts."""
