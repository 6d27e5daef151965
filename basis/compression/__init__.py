"""From a trained network to a smaller one: the steps behind ``basis compress``."""
