"""`python -m evomerge` is the command `evomerge`."""

from evomerge.cli import main

if __name__ == "__main__":
    main()
