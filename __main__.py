"""``python -m gradsync``: the same as the ``gradsync`` command."""

from .cli import main

if __name__ == "__main__":
    main()
