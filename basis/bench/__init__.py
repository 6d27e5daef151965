"""Speed, measured: layers, blocks, training steps and whole networks against dense twins."""
