"""Studies: several arms of one recipe over several seeds, with their tables, intervals and figures."""
