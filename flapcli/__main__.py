"""Entry point of `flap` and of `python -m flapcli`."""

from flapcli.cli.app import main

if __name__ == "__main__":
    main()
