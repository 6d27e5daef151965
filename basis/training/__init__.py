"""Training: a recipe, one loop for training and fine-tuning, evaluation, recalibration."""
