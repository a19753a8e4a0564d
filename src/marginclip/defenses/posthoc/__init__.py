"""Corrections of the logits alone."""
