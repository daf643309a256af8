"""Speed and memory, as ratios to a named peer in the same run."""
