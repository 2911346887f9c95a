"""A local web page with deep zoom over generated and real images. No model code, no torch."""
