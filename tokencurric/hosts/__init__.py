"""Other people's models: the names by which they are called and read, and what happens if a name is gone.

Read `lookups` first (what a look-up by name is), then `names` (all of them), then `calls` (a model's arguments).
"""
