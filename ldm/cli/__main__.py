"""`python -m ldm.cli`, as torchrun starts it: the command `histoldm`."""

from ldm.cli import main

if __name__ == "__main__":
    main()
