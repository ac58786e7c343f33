"""How many bytes a run takes, and which sizes fit: arithmetic over shapes, no torch."""
