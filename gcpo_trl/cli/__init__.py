"""Commands: parse, call, exit code."""
