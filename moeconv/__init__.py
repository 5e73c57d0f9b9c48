"""moeconv: an offline converter for mixture-of-experts checkpoints."""
