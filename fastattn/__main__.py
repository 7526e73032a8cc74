"""`python -m fastattn`: the fastattn command."""

from fastattn.cli import main

if __name__ == "__main__":
    main()
