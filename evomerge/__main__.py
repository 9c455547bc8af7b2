"""`python -m evomerge` is the command `evomerge`."""

from evomerge.cli import command

if __name__ == "__main__":
    command()
