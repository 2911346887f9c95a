"""Training: the implementation of `python main.py` and `histoldm train`."""
