"""What a user asks for: tiles, translations, edits."""
