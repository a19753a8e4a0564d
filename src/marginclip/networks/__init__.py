"""What every method asks of a network: its logits, a copy of its own, a traced form, its last layer, its layout in memory."""
