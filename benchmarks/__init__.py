"""Speed and memory, measured as ratios against a named peer in one run."""
