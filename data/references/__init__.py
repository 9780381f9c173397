"""Reference policies: found, scored and admitted without a hand in between."""
