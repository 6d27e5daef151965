"""Layers: the basis convolution, its batch normalisation, and other structured convolutions."""
