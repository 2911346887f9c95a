"""Training: one implementation behind `python main.py` and `histoldm train`."""
