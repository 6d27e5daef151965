"""Basis convolutions: train k of a layer's filters, mix the others from them, and learn where that is safe."""
