"""``python -m moe_infinity``: the command ``moe-infinity``, of whichever Python is asked."""

from moe_infinity.cli import main

if __name__ == "__main__":
    main()
