"""moeconv: an offline converter for mixture-of-experts checkpoints."""

from __future__ import annotations

__version__ = "0.1.0"
