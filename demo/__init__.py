"""The main job on a real slide, as the commands that a user types: `make demo`, or `python -m demo`."""
