"""Entry point of `flap` and of `python -m flapcli`."""

from flapcli.cli.interrupts import end_at_once


def main() -> None:
    end_at_once()
    from flapcli.cli.app import main as run  # what takes time, from where an interrupt is answered

    run()


if __name__ == "__main__":
    main()
