"""Defenses that change weights."""
