"""Quantized models for the programs that run them: layout, formats, verification by their clients, model card."""
