"""Sensitivity search: what each layer loses when substituted, and which layers to choose under a budget."""
