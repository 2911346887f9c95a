"""Bodies of the `histoldm` commands: read what the user gave, check it, generate, write."""
