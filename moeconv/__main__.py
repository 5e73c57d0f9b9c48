"""python -m moeconv: the command line."""

from __future__ import annotations

from moeconv.cli import main

if __name__ == "__main__":
    main()
