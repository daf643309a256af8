"""How much memory a run takes, computed from its settings before it starts."""
