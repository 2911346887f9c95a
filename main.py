"""Train a model: `histoldm train` as users of latent-diffusion know it. `python main.py --help` tells the rest."""

import sys

from ldm.training.command import main

if __name__ == "__main__":
    sys.exit(main())
