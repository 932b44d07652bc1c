"""Tensors of published checkpoints: files, folders, quantised forms, places in a model."""
