"""What an evaluation prints and draws."""
