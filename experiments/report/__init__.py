"""The page that an evaluation writes."""
