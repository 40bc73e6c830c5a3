"""`python -m loramix.cli` is `loramix`; so is `torchrun -m loramix.cli`."""

from loramix.cli import main

if __name__ == "__main__":
    main()
