"""Choosing between defenses from the clean set."""
