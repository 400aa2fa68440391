"""Quantized models for the programs that run them: plan, four formats, verification by their clients, model card."""
