"""Ensembles that score images: their training, calibration, selection by them, ratings."""
