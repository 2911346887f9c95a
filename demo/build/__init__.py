"""The scripts that made the small models and samples of this repository."""
