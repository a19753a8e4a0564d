"""Defenses that bound activations and change no weight."""
