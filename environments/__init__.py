"""One interface over every environment library."""
