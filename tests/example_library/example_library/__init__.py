"""A third party's library of environments."""
