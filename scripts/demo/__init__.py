"""A page to draw on: static files, and a small same-origin proxy in front of a served model."""
