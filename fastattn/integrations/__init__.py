"""Ways to put fastattn's attention into models that exist."""
