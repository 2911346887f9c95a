"""From a model and a condition to images: settings, tiles, canvases, translations, sweeps."""
