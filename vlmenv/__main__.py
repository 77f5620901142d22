"""`python -m vlmenv` is the command `vlmenv`."""

from vlmenv.cli import main

if __name__ == "__main__":
    main()
