"""The command line: parsing, help, config files."""
